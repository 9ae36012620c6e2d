"""How fast a random model of 10^9 parameters reads a prompt and decodes, with dense and with packed weights.

    python experiments/packed_decode.py --out results/gpu/decode.jsonl     an object a line, written as each is measured
    python experiments/packed_decode.py --tiny --out X                     a model of 10^6 parameters

Dense: kernels decoded to the compute type. Packed: as `qjax generate --packed` multiplies. Batches of 1 and 8, prompts of 512
tokens and 64 new ones. Lines that are there, of the same code, versions and device, are not measured again.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from random_models import configuration, random_model

import qjax
from qjax.sweep.measurements.provenance import provenance

FORMATS = ("int4-g128", "int8-channel-sym", "nf4-g64")
BATCHES = (1, 8)


def run(out: Path, *, tiny: bool = False) -> list[dict[str, object]]:
    """Measures what the file lacks, and returns all of its lines."""
    name, formats, batches, tokens = ("1M", FORMATS[:1], (1,), (8, 4)) if tiny else ("1B", FORMATS, BATCHES, (512, 64))
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []
    model = random_model(configuration(name), name, dtype)
    for fmt in ("none", *formats):
        made, quantized = provenance() | {"model": model.name, "format": fmt}, None
        for batch in batches:
            about = made | {"batch": batch, "prompt_tokens": tokens[0], "new_tokens": tokens[1]}
            if any(about.items() <= line.items() for line in lines):
                continue
            if quantized is None:
                quantized = model if fmt == "none" else qjax.quantize(model, f"rtn:{fmt}")[0]
            speed = qjax.measure_speed(
                quantized, packed=fmt != "none", prompt_tokens=tokens[0], new_tokens=tokens[1], batch=batch
            )
            lines.append(about | speed._asdict())
            with out.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(lines[-1])}\n")
            print(f"{fmt}, batch {batch}: prefill {speed.prefill_tokens_per_second:,.0f} tokens/s, ", end="")
            print(f"decoding {speed.decode_tokens_per_second:,.0f}, weights {speed.running_bytes / 1e9:.2f} GB", flush=True)
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run(options.out, tiny=options.tiny)

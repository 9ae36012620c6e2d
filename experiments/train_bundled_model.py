"""Train the model that ships with qjax, and write it as a Hugging Face folder.

    python experiments/train_bundled_model.py --run runs/bundled --out qjax/models/bundled

The text is what every machine has (`qjax/train/text.py`), less the held-out part of `python-docs`; the tokenizer is a
byte-level BPE trained on it. A run that was stopped continues from its last checkpoint under --run, bit for bit.
`--tiny` is the same code on little text and a very small model, under runs/tiny.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import time
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qjax.checkpoints.huggingface import save_huggingface
from qjax.evaluate.perplexity import PerplexityResult, perplexity
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.models.tokenizer import Tokenizer, load_tokenizer
from qjax.train import pretrain
from qjax.train.text import SHORTEST_HELD_OUT_LINE, Document, training_documents

BOS, EOS = "<bos>", "<eos>"
SMALLEST_NAMED_SOURCE = 200_000  # bytes; the card names smaller sources together


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The run: text, tokenizer and optimisation."""

    train: pretrain.PretrainConfig
    package_bytes: int = 1_500_000  # of code, and of prose, from any one package
    documents: int | None = None  # only so many documents (the tiny twin)
    repeats: tuple[tuple[str, int], ...] = (("python-docs", 8), ("prose", 2), ("code", 1))
    tokenizer_share: int = 6  # one document in so many trains the tokenizer
    save_every: int = 200
    evaluate_every: int = 500
    evaluate_windows: int = 32  # held-out windows of a check during training
    final_windows: int | None = None  # and of the figure in the card; None: all
    devices: int = 2


def model_config(**changes: int) -> DecoderConfig:
    """Llama's layout with 1.3 million parameters; each linear layer's input is a multiple of 128."""
    sizes = {"vocabulary_size": 1024, "hidden_size": 128, "mlp_size": 384, "layers": 6, "heads": 4, "kv_heads": 2}
    sizes |= {"head_dim": 32, "context": 256, "tied": True, "bos_id": 0, "eos_id": 1}
    return DecoderConfig(family="llama", **(sizes | changes))


def full(steps: int) -> Experiment:
    return Experiment(pretrain.PretrainConfig(model_config(), steps=steps))


def tiny(steps: int) -> Experiment:
    model = model_config(vocabulary_size=384, mlp_size=128, layers=2, context=64)
    train = pretrain.PretrainConfig(model, steps=steps, batch=8)
    text = {"package_bytes": 0, "documents": 60, "tokenizer_share": 1}
    return Experiment(train, **text, save_every=10, evaluate_every=20, evaluate_windows=16, final_windows=64, devices=1)


# --- text to tokens ------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocabulary_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE; the two special tokens come first, and encoding adds neither."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[BOS, EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(experiment: Experiment, run: Path) -> None:
    """Write tokenizer.json, tokens.npy (uint16, documents repeated as weighted, each <bos> text <eos>) and data.json."""
    documents = training_documents(package_bytes=experiment.package_bytes)[: experiment.documents]
    tokenizer = train_tokenizer(
        [d.text for d in documents if d.source == "python-docs"]
        + [d.text for d in documents[:: experiment.tokenizer_share] if d.source != "python-docs"],
        experiment.train.model.vocabulary_size,
    )
    repeats = dict(experiment.repeats)
    encoded = tokenizer.encode_batch_fast([d.text for d in documents])
    pieces = []
    for document, encoding in zip(documents, encoded, strict=True):
        ids = [tokenizer.token_to_id(BOS), *encoding.ids, tokenizer.token_to_id(EOS)]
        pieces += [np.array(ids, np.uint16)] * repeats[weight_class(document)]
    random.Random(experiment.train.seed).shuffle(pieces)
    tokens = np.concatenate(pieces)
    run.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(run / "tokenizer.json"))
    np.save(run / "tokens.npy", tokens)
    description = json.dumps(describe_data(documents, len(tokens)), indent=1)
    (run / "data.json").write_text(description)  # written last: where it is, the text is complete


def weight_class(document: Document) -> str:
    return "python-docs" if document.source == "python-docs" else "prose" if document.prose else "code"


def describe_data(documents: list[Document], stream: int) -> dict:
    """What the model card says of the text: bytes by kind and by package, with versions."""
    kinds: Counter = Counter()
    packages: defaultdict = defaultdict(int)
    for document in documents:
        size = len(document.text.encode())
        kinds[weight_class(document)] += size
        packages[document.source] += size
    names = metadata.packages_distributions()
    versions = {p: metadata.version(names[p][0]) for p in packages if p in names}
    return {"python": platform.python_version(), "bytes": kinds, "packages": packages, "versions": versions, "stream": stream}


# --- the run -------------------------------------------------------------------------------------------------------------


def run_tokenizer(experiment: Experiment, run: Path) -> Tokenizer:
    model = experiment.train.model
    return load_tokenizer(run / "tokenizer.json", bos_id=model.bos_id, eos_id=model.eos_id)


def held_out_perplexity(model: Model, max_windows: int | None) -> PerplexityResult:
    """Perplexity on the held-out side of `python-docs`, as `qjax eval` measures it, in windows of the model's context."""
    params = jax.device_get(model.params)  # replicated parameters would be evaluated once per device
    return perplexity(model._replace(params=params), "python-docs", f"windows-{model.config.context}", max_windows=max_windows)


def run_training(experiment: Experiment, run: Path) -> pretrain.TrainState:
    """Train to the end from the run's last checkpoint, logging one JSON line every ten steps."""
    config = experiment.train
    if not (run / "data.json").exists():
        prepare(experiment, run)
    tokens = np.load(run / "tokens.npy")
    tokenizer = run_tokenizer(experiment, run)
    step_fn = pretrain.make_step(config, experiment.devices)
    with pretrain.checkpoints(run / "ckpt") as manager, (run / "log.jsonl").open("a", buffering=1) as log:
        state = pretrain.restore_latest(manager, config)
        started, losses = time.perf_counter(), []
        for step in range(int(state.step), config.steps):
            state, value = step_fn(state, pretrain.batch_at(tokens, config, step))
            losses.append(value)
            done, last = step + 1, step + 1 == config.steps
            row = {}
            if done % 10 == 0 or last:
                row = {"step": done, "loss": float(np.mean(losses)), "lr": float(pretrain.learning_rate(config, step))}
                losses = []
            if done % experiment.evaluate_every == 0 or last:
                model = Model(config.model, state.params, tokenizer, "training")
                result = held_out_perplexity(model, experiment.evaluate_windows)
                row |= {"step": done, "bits_per_byte": result.bits_per_byte, "convention": result.convention}
            if row:
                row |= {"tokens": done * config.tokens_per_step, "seconds": round(time.perf_counter() - started, 1)}
                log.write(json.dumps(row) + "\n")
            if done % experiment.save_every == 0 or last:
                pretrain.save(manager, state)
    return state


# --- what is written -----------------------------------------------------------------------------------------------------


def export(experiment: Experiment, state: pretrain.TrainState, run: Path, out: Path) -> None:
    """Write the weights in bfloat16, config.json, the tokenizer's files and the model card into `out`."""
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.bfloat16), state.params)
    model = Model(experiment.train.model, params, run_tokenizer(experiment, run), "bundled")
    save_huggingface(out, model, overwrite=True)
    result = held_out_perplexity(model, experiment.final_windows)
    (out / "README.md").write_text(model_card(experiment, params, run, result))


def model_card(experiment: Experiment, params: dict, run: Path, result: PerplexityResult) -> str:
    """The model card: data, steps, result, loss curve and command."""
    train, model = experiment.train, experiment.train.model
    data = json.loads((run / "data.json").read_text())
    log = {row["step"]: row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines())}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens, repeats = train.steps * train.tokens_per_step, dict(experiment.repeats)
    curve = [(step, row) for step, row in sorted(log.items()) if "bits_per_byte" in row]
    final = np.mean([row["loss"] for step, row in log.items() if step > train.steps - 100 and "loss" in row])
    lines = [
        "# qjax's bundled model",
        "",
        f"A Llama-layout decoder of {parameters:,} parameters (hidden {model.hidden_size}, {model.layers} layers, "
        f"{model.heads} heads of {model.head_dim}, {model.kv_heads} key/value heads, SwiGLU {model.mlp_size}, RoPE, tied "
        f"embeddings, context {model.context}), with a byte-level BPE vocabulary of {model.vocabulary_size}. It exists so that "
        "quantization can be measured on any machine without a download; it knows Python documentation and nothing else.",
        "",
        "| | |",
        "|---|---|",
        f"| bits per byte on the held-out part of `python-docs` (Python {platform.python_version()}, {result.convention}, "
        f"{result.tokens:,} tokens and their {result.nbytes:,} bytes scored) | {result.bits_per_byte:.4f} |",
        f"| perplexity of a token, the same | {result.value:.4f} |",
        f"| training loss, mean of the last 100 steps (nats per token) | {final:.4f} |",
        f"| steps | {train.steps:,} of {train.batch} x {model.context} tokens |",
        f"| tokens seen | {tokens:,} ({tokens / parameters:.1f} per parameter) |",
        f"| optimizer | AdamW, b1 {train.b1}, b2 {train.b2}, weight decay {train.weight_decay} on matrices, gradient norm "
        f"at most {train.clip_norm} |",
        f"| learning rate | {train.peak_learning_rate:g}, warm-up {train.warmup_fraction:.0%} of the steps, then linearly to "
        "zero |",
        f"| arithmetic | float32, seed {train.seed}; weights stored as bfloat16 |",
        f"| command | `python experiments/train_bundled_model.py --steps {train.steps}` |",
        "",
        "## Data",
        "",
        f"Python {data['python']}'s standard library and the packages installed beside it (at most "
        f"{experiment.package_bytes:,} bytes of code and as many of prose from each), less tests, tables and vendored copies. "
        "Held out: the test side of `python-docs`, the source files of its modules, and in every other text each line of "
        f"{SHORTEST_HELD_OUT_LINE} characters or more that the test side has too.",
        "",
        "| text | bytes | times in the training stream |",
        "|---|---|---|",
        *(f"| {kind} | {size:,} | {repeats[kind]} |" for kind, size in data["bytes"].items()),
        "",
        f"The stream has {data['stream']:,} tokens. Bytes by source: {sources(data)}.",
        "",
        "## Loss curve",
        "",
        f"{curve_note(experiment, curve)} The training loss is of ten steps.",
        "",
        "| step | training loss | held-out bits per byte |",
        "|---|---|---|",
        *(f"| {step:,} | {row['loss']:.3f} | {row['bits_per_byte']:.4f} |" for step, row in curve),
    ]
    return "\n".join(lines) + "\n"


def sources(data: dict) -> str:
    """The bytes of each source of the text, the small ones together."""
    large = {name: size for name, size in data["packages"].items() if size >= SMALLEST_NAMED_SOURCE}
    named = sorted(large.items(), key=lambda item: -item[1])
    entries = [f"{name} {data['versions'].get(name, '')}".strip() + f" {size:,}" for name, size in named]
    small = [size for name, size in data["packages"].items() if name not in large]
    return ", ".join(entries) + (f", and {len(small)} smaller packages {sum(small):,}" if small else "")


def curve_note(experiment: Experiment, curve: list[tuple[int, dict]]) -> str:
    """What the bits per byte of the curve are. Logs of qjax's first training name no convention: it had its own measure."""
    windows, context = experiment.evaluate_windows, experiment.train.model.context
    if all("convention" in row for _, row in curve):
        return f"Bits per byte here are of the first {windows} held-out windows of {context} tokens, in float32 weights."
    return (
        f"Bits per byte here are not quite those of the table above: they are of the first {windows * context:,} held-out "
        f"tokens, taken during training by a former measure, which counted the unscored first token of a window of {context} "
        "and its bytes too, at the mean loss of the others."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, help="4000, or 40 with --tiny")
    parser.add_argument("--run", type=Path, help="tokens, checkpoints and log; runs/bundled, or runs/tiny with --tiny")
    parser.add_argument("--out", type=Path, help="the model's folder; qjax/models/bundled, or runs/tiny/model with --tiny")
    parser.add_argument("--tiny", action="store_true", help="little text and a very small model")
    options = parser.parse_args()
    steps, run, out = (40, "runs/tiny", "runs/tiny/model") if options.tiny else (4000, "runs/bundled", "qjax/models/bundled")
    parser.set_defaults(steps=steps, run=Path(run), out=Path(out))
    options = parser.parse_args()
    experiment = (tiny if options.tiny else full)(options.steps)
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", experiment.devices)
    state = run_training(experiment, options.run)
    export(experiment, state, options.run, options.out)


if __name__ == "__main__":
    main()

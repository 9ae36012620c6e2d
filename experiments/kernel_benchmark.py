"""How fast products with packed weights are on the device at hand, against the dense product and other libraries.

    python experiments/kernel_benchmark.py                 writes results/kernels/, four to thirteen minutes on 2 cores
    python experiments/kernel_benchmark.py --tiny --out X  one small weight, for tests

Every implementation that serves the device, at M = 1 to 512 rows of x, on the shapes of 7- and 8-billion-parameter models; on
GPUs also bitsandbytes' NF4 and torchao's int4, on CPUs bitsandbytes' NF4, where they are installed. All programs of a shape and
M take turns in one run, so that ratios are of the same machine in the same state.

Expected of accelerators, not measured yet: with few rows a product takes the time of reading its weight, so packed ones are
faster than dense ones by up to the ratio of their bytes; with many rows arithmetic takes the time, and decoding is what a
packed product adds. On CPUs decoding counts at one row too.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp

import qjax
from qjax.kernels import layout, timing
from qjax.kernels.matmul import IMPLEMENTATIONS, KERNELS, choose, matmul
from qjax.report.reports import write_reports
from qjax.sweep.measurements.provenance import provenance
from qjax.sweep.store import ROWS, append_rows, read_rows


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 14336), (14336, 4096))
    formats: tuple[str, ...] = ("int8-channel-sym", "int4-g128", "int3-g128", "int2-g64", "nf4-g64")
    rows: tuple[int, ...] = (1, 8, 16, 32, 128, 512)
    copies: int = 2  # of a weight: more bytes than a cache holds
    copied_bytes: int = 2**30  # for the device's bandwidth
    repeats: int = 5


TINY = Experiment(((256, 128),), ("int4-g128", "nf4-g64"), (1, 16), copies=2, copied_bytes=2**20, repeats=2)
Cases = dict[tuple[str, str], tuple[timing.Program, int]]  # (format, implementation): what runs, bytes of one weight
PEERS = ("bitsandbytes", "torchao")


def run(experiment: Experiment, out: Path) -> list[dict[str, object]]:
    """Measures the shapes and M that out/rows.jsonl lacks of this device, code and versions, and writes the table."""
    rows = read_rows(out / ROWS)
    made = provenance()
    copy = timing.copy_bandwidth(experiment.copied_bytes, repeats=experiment.repeats)
    for shape in experiment.shapes:
        for count in experiment.rows:
            about = made | {"kind": "kernels", "inputs": shape[0], "outputs": shape[1], "rows": count}
            if any(about.items() <= row.items() for row in rows):
                continue
            now = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
            measured = [
                about | now | row | {"copy_bytes_per_second": copy, "bandwidth_fraction": row["bytes_per_second"] / copy}
                for row in measure(experiment, shape, count)
            ]
            key = "kernels: {device}, {inputs}x{outputs}, {format}, {implementation}, M={rows}"
            measured = [{"key": key.format(**row)} | row for row in measured]
            append_rows(out / ROWS, measured)
            rows += measured
    write_reports(out, rows)
    return rows


def measure(experiment: Experiment, shape: tuple[int, int], count: int) -> list[dict[str, object]]:
    """A row for every program at one shape and M."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = jax.random.normal(jax.random.key(1), (count, shape[0])).astype(dtype)
    weight = random_weight(shape)
    dense = repeat(weight.astype(dtype), experiment.copies)
    cases: Cases = {("dense", "dense"): (timing.products(jnp.matmul, x, dense), dense[0].nbytes)}
    for fmt in experiment.formats:
        cases |= jax_cases(x, quantized(shape, fmt), experiment.copies)
    cases |= torch_cases(x, weight, experiment.copies)
    seconds = timing.paired_seconds([program for program, _ in cases.values()], repeats=experiment.repeats)
    rows = []
    for ((fmt, implementation), (_, size)), total in zip(cases.items(), seconds, strict=True):
        moved = size + (x.size + count * shape[1]) * x.dtype.itemsize
        speed = moved * experiment.copies / total
        rows.append({"format": fmt, "implementation": implementation, "dtype": x.dtype.name, "weight_bytes": size})
        rows[-1] |= {"seconds": total / experiment.copies, "bytes_per_second": speed, "speedup": seconds[0] / total}
        if implementation in PEERS:
            rows[-1]["library"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (implementation, "torch"))
    return rows


@functools.lru_cache(maxsize=1)
def random_weight(shape: tuple[int, int]) -> jax.Array:
    """A float32 weight of about the size of a trained one's."""
    return jax.random.normal(jax.random.key(0), shape) * shape[0] ** -0.5


@functools.lru_cache(maxsize=8)
def quantized(shape: tuple[int, int], fmt: str) -> qjax.QTensor:
    """The weight in a format."""
    return qjax.rtn(random_weight(shape), fmt)[0]


def repeat(weight, copies: int) -> list:
    """Copies in memory of their own."""
    return [jax.tree.map(jnp.copy, weight) for _ in range(copies)]


def jax_cases(x: jax.Array, q: qjax.QTensor, copies: int) -> Cases:
    """Our implementations that serve this device and weight; kernels read their own layout, made beforehand."""
    cases: Cases = {}
    for name in IMPLEMENTATIONS[1:]:
        try:
            choose(name, x.dtype, q)
        except qjax.QjaxError:
            continue
        held = layout.prepare(q) if name in KERNELS else q
        multiply = functools.partial(matmul, implementation=name)
        cases[str(q.format), name] = timing.products(multiply, x, repeat(held, copies)), held.nbytes
    return cases


def torch_cases(x: jax.Array, weight: jax.Array, copies: int) -> Cases:
    """Other libraries' linear layers, where they are installed; on a GPU as one CUDA graph, as XLA runs its programs."""
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None or not importlib.util.find_spec("torch"):
        return {}
    import numpy as np
    import torch

    x = torch.tensor(np.asarray(x, np.float32), dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    values = torch.tensor(np.asarray(weight, np.float32).T, dtype=x.dtype)  # torch keeps (out, in)

    def case(make, nbytes: float) -> tuple[timing.Program, int]:
        layers = [make() for _ in range(copies)]

        def call():
            with torch.inference_mode():
                return [layer(x) for layer in layers]

        if device == "cpu":
            return call, round(nbytes)
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return lambda: (graph.replay(), torch.cuda.synchronize()), round(nbytes)

    cases: Cases = {}
    if importlib.util.find_spec("bitsandbytes"):
        cases["nf4-b64", "bitsandbytes"] = case(functools.partial(bitsandbytes_layer, values, device), values.numel() * 0.5625)
    if device == "cuda" and importlib.util.find_spec("torchao"):
        cases["int4-g128", "torchao"] = case(functools.partial(torchao_layer, values), values.numel() * (0.5 + 4 / 128))
    return cases


def bitsandbytes_layer(values, device: str):
    """A Linear4bit layer as bitsandbytes users run it."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(*values.shape[::-1], bias=False, compute_dtype=values.dtype, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(values.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    return layer.to(device).eval()


def torchao_layer(values):
    """A linear layer with torchao's int4 weights in groups of 128."""
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(*values.shape[::-1], bias=False, dtype=values.dtype, device="cuda")
    layer.weight.data.copy_(values)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128))
    return layer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    out = options.out or Path("runs/tiny" if options.tiny else "results") / "kernels"
    out.mkdir(parents=True, exist_ok=True)
    run(TINY if options.tiny else Experiment(), out)

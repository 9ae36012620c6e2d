"""Handmade rows for the tests of tables and figures: round numbers, no model."""

import itertools
import math

from qjax.formats import parse_format
from qjax.sweep.rows import complete

BASELINE = 10.0


def measured_row(recipe: str, delta: float = 0.0, stderr: float = 0.01, **changes: object) -> dict[str, object]:
    """A row of `recipe` whose loss is `delta` nats above the unquantized model's perplexity of 10."""
    row = early_row(recipe, delta, stderr, **changes)
    documents = {"window_documents": list(range(len(row["window_nll"])))} if "window_nll" in row else {}
    return complete(documents | row)


def early_row(recipe: str, delta: float = 0.0, stderr: float = 0.01, **changes: object) -> dict[str, object]:
    """The same as rows of earlier versions have it."""
    stages, _, name = recipe.partition("@")[0].partition("/")[0].rpartition(":")
    fmt = None if recipe == "none" else parse_format(name)
    bits = fmt.bits_per_weight(256, 512) if fmt else 16.0
    codebook = fmt and not fmt.grid.startswith("int")
    ratio = math.exp(delta)
    return {
        "key": recipe,
        "time": "2026-01-01T00:00:00+00:00",
        "model": "toy",
        "fingerprint": "0123456789abcdef",
        "recipe": recipe,
        "method": "none" if fmt is None else fmt.grid if codebook and stages in ("", "rtn") else stages.partition("(")[0],
        "format": str(fmt or "none"),
        "corpus": "python-docs",
        "corpus_fingerprint": "fedcba9876543210",
        "convention": "windows-512",
        "windows": 8,
        "seed": 0,
        "bits_per_weight": bits,
        "model_bits_per_weight": 0.75 * bits + 4.0,
        "size_bytes": int(250_000 * bits),
        "perplexity": BASELINE * ratio,
        "perplexity_stderr": 0.25 * ratio,
        "nll": math.log(BASELINE) + delta,
        "nll_delta": delta,
        "nll_delta_stderr": stderr if fmt else 0.0,
        "nll_delta_low": delta - 1.96 * stderr if fmt else 0.0,
        "nll_delta_high": delta + 1.96 * stderr if fmt else 0.0,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * stderr if fmt else 0.0,
        "tokens": 4088,
        "weight_error": 4.0 ** -(fmt.bits if fmt else math.inf),
        "seconds_quantize": 0.125,
        "tokens_per_second": 7300.4,
        "device": "cpu: x86_64 x2",
        "code": "c0de",
        **changes,
    }


def sweep_rows() -> list[dict[str, object]]:
    """A small sweep: one recipe within noise, one far off."""
    return [
        measured_row("rtn:int2-g128", 1.5, 0.05),
        measured_row("none"),
        measured_row("rtn(clip=mse):int4-g128", 0.02, 0.004),
        measured_row("nf4-g64", 0.001, 0.002),
    ]


def infinite_row() -> dict[str, object]:
    """A row whose perplexity is too large for a float."""
    infinite = dict.fromkeys(("perplexity", "perplexity_stderr", "perplexity_ratio", "perplexity_ratio_stderr"), math.inf)
    return measured_row("rtn:int2-g128", 0.0, math.nan) | infinite | {"nll": 802.3, "nll_delta": 800.0}


def alone_row(pattern: str, delta: float, stderr: float = 0.001, by: str = "gptq(clip=mse):int3-g128") -> dict[str, object]:
    """A row of one place quantized alone."""
    recipe = f"none; {pattern}={by}"
    ends = {"nll_delta_stderr": stderr, "nll_delta_low": delta - 1.96 * stderr, "nll_delta_high": delta + 1.96 * stderr}
    return complete(early_row("none", delta) | {"recipe": recipe, "key": recipe} | ends)


def calibrated_rows() -> list[dict[str, object]]:
    """The unquantized model, and one recipe calibrated on 2 texts x 2 numbers of windows x 2 seeds."""
    rows = [measured_row("none", window_nll=[600.0] * 8, window_tokens=[256] * 8)]
    for text, windows, seed in itertools.product(("c4", "python-docs"), (8, 32), (0, 1)):
        delta = 0.1 + 0.4 / windows + 0.02 * (text == "python-docs") + 0.002 * seed
        drawn = {
            "calibration_windows": windows,
            "calibration_window_tokens": 256,
            "calibration_fingerprint": f"{text}{windows}{seed}",
        }
        losses = {"window_nll": [600.0 + 256 * delta + 0.1 * (i - 3.5) for i in range(8)], "window_tokens": [256] * 8}
        told = {"calibration": text, "calibration_source": text, "seed": seed, "key": f"{text}{windows}{seed}"}
        rows.append(measured_row("gptq:int3-g128", delta, 0.002, **drawn, **losses, **told))
    return rows

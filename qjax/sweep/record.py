"""What a row says and where it comes from: its schema, its key and the provenance of a run.

A row's key is a hash of everything that can change its figures: model weights, recipe, rules, text, convention, seed, library
versions, machine kind, compute type, and the source code less what only presents results. Equal keys mean equal figures.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import qjax
from qjax.calibrate.tokens import Calibration
from qjax.driver.report import Report
from qjax.evaluate.perplexity import PerplexityResult
from qjax.evaluate.statistics import bootstrap_interval, ratio_stderr
from qjax.models.model import Model, compute_dtype
from qjax.recipe import UNQUANTIZED, Recipe, Stage, method_name

PACKAGE = Path(__file__).parents[1]
UNMEASURED = (
    "cli",
    "report",
    "train",
    "sweep/request.py",
    "sweep/rerun.py",
)  # parts of the package that no measured figure depends on
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "tokenizers")


def digest(*parts: object) -> str:
    """16 hexadecimal digits of a SHA-256 over JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def model_fingerprint(model: Model) -> str:
    """Digest of a model's configuration, vocabulary and every parameter's path, type, shape and bytes."""
    total = hashlib.sha256(repr(model.config).encode())
    if model.tokenizer is not None:
        total.update(model.tokenizer.to_json().encode())
    for path, leaf in sorted(flatten_dict(model.params, sep="/").items()):
        for array in jax.tree.leaves(leaf):
            total.update(f"{path} {array.dtype} {array.shape}".encode())
            total.update(np.asarray(array).tobytes())
    return total.hexdigest()[:16]


@functools.cache
def code_fingerprint() -> str:
    """Digest of the package's source, less what no figure depends on."""
    total = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if not {relative.parts[0], relative.as_posix()} & set(UNMEASURED):
            total.update(str(relative).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def provenance(added: Mapping[str, str] = MappingProxyType({})) -> dict[str, object]:
    """Versions, code and device of this process. added: sources of methods that do not belong to the package."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{platform.machine()} x{os.cpu_count()}"
    return {
        "versions": ", ".join([f"qjax {qjax.__version__}", f"python {platform.python_version()}", *versions]),
        "code": digest(code_fingerprint(), dict(added)) if added else code_fingerprint(),
        "device": f"{device.platform}: {kind}",
        "compute_dtype": jnp.dtype(compute_dtype()).name,
    }


def calibration_columns(calibration: Calibration | None, order: Stage | None) -> dict[str, object]:
    """Where a row's calibration data is from; all None for recipes that read none (order None)."""
    used = calibration if order is not None else None
    windows, window = used.tokens.shape if used else (None, None)
    return {
        "order": order and str(order),
        "calibration": used and used.name,
        "calibration_source": used and used.source,
        "calibration_fingerprint": used and used.fingerprint,
        "calibration_windows": windows,
        "calibration_window_tokens": window,
    }


def layer_rows(key: str | None, report: Report) -> list[dict[str, object]]:
    """One flat row a quantized kernel; key: of the cell, None outside a sweep."""
    records = [record._asdict() for record in report.layers if record.recipe != UNQUANTIZED]
    return [({"key": key} if key else {}) | {name: _jsonable(value) for name, value in record.items()} for record in records]


def make_row(
    identity: dict[str, object],
    recipe: Recipe | None,
    report: Report,
    result: PerplexityResult,
    baseline: dict[str, object] | None,
    *,
    more: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, object]:
    """One measured cell, flat. identity: what was measured and where; baseline: the unquantized model's row, or None.

    more: columns of further measurements (`measures.py`).
    """
    errors = [layer.weight_error for layer in report.layers if layer.weight_error is not None]
    outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
    row = identity | {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "method": method_name(recipe),
        "options": ",".join(map(str, recipe.stages)) if recipe else "",
        "format": str(recipe.format) if recipe else "none",
        "bits": recipe.format.bits if recipe else None,
        "convention": result.convention,
        "windows": len(result.window_nll),
        "bits_per_weight": report.bits_per_weight,
        "model_bits_per_weight": report.model_bits_per_weight,
        "size_bytes": report.size_bytes,
        "perplexity": result.value,
        "perplexity_stderr": result.stderr,
        "nll": result.nll,
        "nll_stderr": result.nll_stderr,
        "tokens": result.tokens,
        "bits_per_byte": result.bits_per_byte,
        "weight_error": float(np.mean(errors)) if errors else 0.0,
        "output_error": float(np.mean(outputs)) if outputs else None,
        "damp": max((layer.damp for layer in report.layers if layer.damp is not None), default=None),
        "seconds_quantize": report.seconds,
        "seconds_evaluate": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_rss_bytes": peak_rss_bytes(),
        "window_nll": [round(nll, 5) for nll in result.window_nll],
        "window_tokens": list(result.window_tokens),
    }
    row |= compare(row, baseline or row) | dict(more)
    return {name: _jsonable(value) for name, value in row.items()}


def _jsonable(value: object) -> object:
    """JSON has neither nan (a standard error of a single window) nor infinity (a model that diverged): null and "inf"."""
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "inf"


def compare(row: dict[str, object], baseline: dict[str, object]) -> dict[str, float]:
    """Difference from the baseline, its standard error paired over windows: the text's difficulty cancels."""
    change = np.asarray(row["window_nll"]) - np.asarray(baseline["window_nll"])
    counts = np.asarray(row["window_tokens"])
    delta, stderr = float(row["nll"] - baseline["nll"]), ratio_stderr(change, counts)
    low, high = bootstrap_interval(change, counts)
    ratio = math.exp(delta) if delta < 700 else math.inf
    return {
        "nll_delta": delta,
        "nll_delta_stderr": stderr,
        "nll_delta_low": low,
        "nll_delta_high": high,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * stderr,
    }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: what getrusage says there starts at the peak of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

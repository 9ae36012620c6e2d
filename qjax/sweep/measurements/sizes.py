"""What a recipe made of the weights: exact sizes, errors, time."""

from typing import TYPE_CHECKING

import numpy as np

from qjax.formats import UNQUANTIZED
from qjax.models.config import DecoderConfig
from qjax.sweep.columns import Cell, Column, Measurement

if TYPE_CHECKING:  # columns are known without JAX
    from qjax.driver.report import Report

STORED = "exact, over the quantized kernels: codes, scales, zero points, maps and scales of inputs, outliers, low-rank adapters"
ERROR = (
    "mean over calibrated kernels of tr(dW' H dW) / tr(W' H W), the squared relative error of their outputs on calibration data"
)
COLUMNS = (
    Column("bits_per_weight", float, "bits", STORED, needed=True),
    Column("model_bits_per_weight", float, "bits", "exact, over the whole model as it is stored"),
    Column("size_bytes", int, "bytes", "exact, of the whole model as it is stored", needed=True),
    Column("cache_bytes_per_token", float, "bytes", "exact, of a token's keys and values in all layers, if these are rounded"),
    Column("cache_window_bytes", int, "bytes", "exact, of those that stay in 16 bits besides, of a text"),
    Column("weight_error", float | None, "", "mean over kernels of the squared relative error of the weights"),
    Column("output_error", float | None, "", ERROR),
    Column("damp", float | None, "of its mean diagonal", "the largest damping that a kernel's Hessian needed"),
    Column("seconds_quantize", float, "s",
        "wall-clock time of calibration and rounding, compilation included; of recipes quantized together each one's share",
        "spent"),
)  # fmt: skip


def measure(cell: Cell) -> dict[str, object]:
    """From the driver's report, and of the cache."""
    return {**figures(cell.report, cell.subject.recipe), **_cache(cell.quantized.config)}


def figures(report: "Report", recipe: str) -> dict[str, object]:
    """From the driver's report. recipe: what the model had been quantized with when it was loaded."""
    from qjax.models.walk import TABLE

    errors = [each.weight_error for each in report.layers if each.weight_error is not None and each.path != TABLE]
    as_it_is = 0.0 if recipe == UNQUANTIZED else None  # of a quantized model its error is not known
    outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
    return {
        "bits_per_weight": report.bits_per_weight,
        "model_bits_per_weight": report.model_bits_per_weight,
        "size_bytes": report.size_bytes,
        "weight_error": float(np.mean(errors)) if errors else as_it_is,
        "output_error": float(np.mean(outputs)) if outputs else None,
        "damp": max((layer.damp for layer in report.layers if layer.damp is not None), default=None),
        "seconds_quantize": report.seconds,
    }


def _cache(config: DecoderConfig) -> dict[str, object]:
    names = ("cache_bytes_per_token", "cache_window_bytes")
    return {} if config.cache is None else dict(zip(names, config.cache_bytes, strict=True))


MEASUREMENT = Measurement("sizes", "Sizes", COLUMNS, measure=measure, when=lambda sweep: True)

"""Perplexity on one text in one convention, and its paired difference from the baseline."""

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from qjax.evaluate.statistics import paired_difference
from qjax.sweep.columns import BASELINE, Cell, Column, Measurement, Row

if TYPE_CHECKING:  # columns are known without JAX
    from qjax.evaluate.perplexity import PerplexityResult

NATS, DIFFERENCE = "nats a token", {"given": BASELINE}
COLUMNS = (
    Column("corpus", str, "", "name of the text", "named", True),
    Column("corpus_fingerprint", str, "", "hash of its documents; `python-docs` differs between Python versions", "asked"),
    Column("convention", str, "", "how perplexity is measured (`qjax/evaluate/windows.py`)", "asked", True),
    Column("max_windows", int | None, "", "limit of windows that was asked for", "told"),
    Column("windows", int, "", "windows measured", "asked"),
    Column("perplexity", float, "", "exp(nll); \"inf\" in early rows: diverged", needed=True),
    Column("perplexity_stderr", float | None, "", "its standard error over documents"),
    Column("nll", float, NATS, "mean -ln p of the scored tokens", needed=True),
    Column("nll_stderr", float | None, NATS, "its standard error over documents"),
    Column("tokens", int, "", "scored tokens", needed=True),
    Column("bits_per_byte", float, "bits", "nll per UTF-8 byte of the scored text"),
    Column("seconds_evaluate", float, "s", "wall-clock time of the forward passes, without compilation and decoding", "spent"),
    Column("tokens_per_second", float, "1/s", "tokens run a second", "spent"),
    Column("window_nll", list[float], "nats", "summed loss of every window"),
    Column("window_tokens", list[int], "", "scored tokens of every window"),
    Column("window_documents", list[int], "", "document of every window: number in the text, from 0"),
    Column("documents", int, "", "documents that windows were measured of"),
    Column("autocorrelation", float | None, "", "lag-1, of the loss of consecutive windows"),
    Column("nll_delta", float | None, NATS, "difference from the baseline", **DIFFERENCE),
    Column("nll_delta_stderr", float | None, NATS, "standard error of the difference, paired, over documents", **DIFFERENCE),
    Column("nll_delta_low", float | None, NATS, "lower end of its 95 % interval, by Student's t", **DIFFERENCE),
    Column("nll_delta_high", float | None, NATS, "upper end", **DIFFERENCE),
    Column("perplexity_ratio", float | None, "", "exp(nll_delta)", **DIFFERENCE),
    Column("perplexity_ratio_stderr", float | None, "", "its standard error", **DIFFERENCE),
)  # fmt: skip


def asks(cell: Cell) -> dict[str, object]:
    """Text and convention."""
    return {
        "corpus": cell.corpus.name,
        "corpus_fingerprint": cell.corpus.fingerprint,
        "convention": str(cell.convention),
        "max_windows": cell.sweep.max_windows,
        "windows": len(cell.windows.tokens),
    }


def measure(cell: Cell) -> dict[str, object]:
    """Of the cell's windows."""
    from qjax.evaluate import perplexity

    cell.states.drop(cell.of_states)  # the clock measures that they are computed
    through = functools.partial(cell.states.through, cell.of_states) if "divergence" in cell.sweep.measures else iter
    result = perplexity.measure(cell.model, cell.windows, cell.convention, cell.corpus, on_batch=cell.on_batch, through=through)
    return figures(result, cell.before)


def figures(result: "PerplexityResult", before: Row | None) -> dict[str, object]:
    """A result's columns. before: the baseline's row; None in that row itself."""
    found = {
        "perplexity": result.value,
        "perplexity_stderr": result.stderr,
        "nll": result.nll,
        "nll_stderr": result.nll_stderr,
        "tokens": result.tokens,
        "bits_per_byte": result.bits_per_byte,
        "seconds_evaluate": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "window_nll": [round(nll, 5) for nll in result.window_nll],
        "window_tokens": list(result.window_tokens),
        "window_documents": list(result.window_documents),
        "documents": len(set(result.window_documents)),
        "autocorrelation": None if math.isnan(result.autocorrelation) else result.autocorrelation,  # of one or two windows
    }
    return found | difference(found, before or found)


def difference(row: Row, before: Row) -> dict[str, float]:
    """Difference from the baseline, its standard error paired over documents: the text's difficulty cancels."""
    losses = (np.asarray(each["window_nll"]) for each in (row, before))
    found = paired_difference(*losses, np.asarray(row["window_tokens"]), np.asarray(row["window_documents"]))
    delta = float(row["nll"] - before["nll"])  # of losses that are not rounded
    ratio = math.exp(delta) if delta < 700 else math.inf
    return {
        "nll_delta": delta,
        "nll_delta_stderr": found.stderr,
        "nll_delta_low": delta + found.low - found.value,
        "nll_delta_high": delta + found.high - found.value,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * found.stderr,
    }


MEASUREMENT = Measurement("perplexity", "Perplexity", COLUMNS, asks, measure, when=lambda sweep: True)

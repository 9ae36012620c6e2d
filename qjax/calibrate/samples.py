"""Calibration samples as people have them -> tokens (samples, longest) and weights that leave the filling out.

an array, lists of one length                  tokens as they are
lists or arrays of different lengths           filled up on the right, where no other token sees it
{"input_ids": ..., "attention_mask": ...}      one sample or several; what the mask leaves out (on either side) is dropped
a list of such                                 the rows of a data set
texts                                          tokenized, each cut into pieces that fit the model's context
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from qjax.errors import QjaxError
from qjax.models.model import Model

IDS, MASK = "input_ids", "attention_mask"


def tokens_of(
    model: Model, given: object
) -> tuple[Int[np.ndarray, "samples longest"], Float[np.ndarray, "samples longest"] | None]:
    """(tokens, weights); weights are None where all tokens count. Raises QjaxError for what is none of the above."""
    if isinstance(given, Mapping):
        return _filled(_unmasked(given))
    if isinstance(given, str):
        given = [given]
    if hasattr(given, "dtype") or not isinstance(given, Iterable):
        return _as_array(given), None
    rows = list(given)
    if rows and all(isinstance(each, str) for each in rows):
        return _filled(_pieces(model, rows))
    if rows and all(isinstance(each, Mapping) for each in rows):
        return _filled([row for each in rows for row in _unmasked(each)])
    ragged = all(hasattr(each, "__len__") for each in rows) and len({len(each) for each in rows}) > 1
    return _filled([_as_array(each) for each in rows]) if ragged else (_as_array(rows), None)


def _as_array(given: object) -> np.ndarray:
    try:
        return np.asarray(given)
    except (TypeError, ValueError):
        raise QjaxError(
            f"calibration: a {type(given).__name__} that is no array; expected integer tokens (windows, time), lists of "
            f"tokens, dictionaries with {IDS!r}, texts, or a Calibration"
        ) from None


def _pieces(model: Model, texts: Sequence[str]) -> list[np.ndarray]:
    if model.tokenizer is None:
        raise QjaxError(f"{model.name} has no tokenizer.json, which calibrating on text needs; give tokens instead")
    context = model.config.context
    ids = [model.tokenizer.encode(text, special_tokens=True) for text in texts]
    return [row[start : start + context] for row in ids for start in range(0, len(row), context)]


def _unmasked(given: Mapping) -> list[np.ndarray]:
    """The rows of a tokenizer's output, without what its mask leaves out."""
    if IDS not in given:
        raise QjaxError(f"calibration: a dictionary with {', '.join(map(str, given.keys()))}; expected {IDS!r} in it")
    ids, mask = given[IDS], given.get(MASK)
    if not hasattr(ids, "__len__"):
        raise QjaxError(f"calibration: {IDS!r} is of type {type(ids).__name__}; expected tokens, or a list of them")
    many = bool(len(ids)) and np.ndim(ids[0]) > 0
    rows = [_as_array(row) for row in (ids if many else [ids])]
    if mask is None:
        return rows
    kept = [_as_array(row).astype(bool) for row in (mask if many else [mask])]
    if [row.shape for row in kept] != [row.shape for row in rows]:
        raise QjaxError(f"calibration: {MASK!r} and {IDS!r} have different shapes; give a mask for every token")
    if any(np.flatnonzero(row).size and np.ptp(np.flatnonzero(row)) + 1 != row.sum() for row in kept):
        raise QjaxError(f"calibration: {MASK!r} leaves out tokens in the middle; give a Calibration with weights instead")
    return [row[keep] for row, keep in zip(rows, kept, strict=True)]


def _filled(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    rows = [row for row in rows if row.size]
    if any(row.ndim != 1 or not np.issubdtype(row.dtype, np.integer) for row in rows):
        raise QjaxError("calibration: samples of different lengths; expected each to be a list of integer tokens")
    if not rows:
        raise QjaxError("calibration: the samples hold no token; give some")
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), rows[0].dtype)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    counted = np.arange(lengths.max()) < lengths[:, None]
    return tokens, None if counted.all() else counted.astype(np.float32)

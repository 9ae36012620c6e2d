"""GPTQ in float64 NumPy, one input feature after another (Frantar et al. 2022, arXiv 2210.17323, algorithm 1).

    minimise tr((Q - W)' H (Q - W))  over codes:      for i in order:
        q_i = nearest(w_i),   e = (w_i - q_i) / U_ii,   w_j -= U_ij e  for j > i,       H^-1 = U' U, U upper triangular

No lazy blocks: they change the order of additions, never the result. The grid comes as callables, so any format fits:

    find(rows (size, out)) -> parameters, a tuple of (out,) arrays, of a group
    encode(row (out,), *parameters) -> codes (out,),    decode(codes, *parameters) -> values (out,)

Groups are runs of `group` input features. Static ones are found from the original weight, or given; dynamic ones are found when
their first row's turn comes, from weights that carry all updates, and are then runs in the order of quantization.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Rounded(NamedTuple):
    """codes, values (in, out); updated (in, out): each weight as it was when its turn came; order (in,); parameters by group.

    proxy_loss: sum of e^2 over all rows, which is tr((Q - W)' (H + damping) (Q - W)).
    """

    codes: np.ndarray
    values: np.ndarray
    updated: np.ndarray
    order: np.ndarray
    parameters: list[tuple[np.ndarray, ...]]
    proxy_loss: float


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    find: Callable,
    encode: Callable,
    decode: Callable,
    *,
    group: int,
    damp: float = 0.01,
    act_order: bool | np.ndarray = False,
    static: bool = True,
    parameters: Sequence[tuple[np.ndarray, ...]] | None = None,
    zero_dead: bool = True,
) -> Rounded:
    """Quantizes weight (in, out).

    act_order: by falling diagonal of the Hessian, or any permutation. parameters: of static groups, where they are given.
    zero_dead: inputs with a diagonal of 0 get one of 1, and weights of 0, as in GPTQ's code; otherwise they are rounded to
    nearest and do not move the damping.
    """
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    rows = len(weight)
    parameters = list(parameters) if parameters else [find(weight[start : start + group]) for start in range(0, rows, group)]
    dead = np.diag(hessian) == 0
    if zero_dead:
        hessian[dead, dead] = 1
        weight[dead] = 0
    order = find_order(hessian, act_order)
    mean = np.mean(np.diag(hessian))
    if not zero_dead:
        hessian[dead, dead] = mean  # alone in their rows: any positive number does
    upper = inverse_factor(hessian[np.ix_(order, order)], damp * mean)
    updated = weight[order]
    codes, values, losses = np.zeros(weight.shape, int), np.zeros(weight.shape), np.zeros(rows)
    for position, row in enumerate(order):
        if static:
            grid = parameters[row // group]
        elif position % group == 0:
            grid = parameters[position // group] = find(updated[position : position + group])
        codes[row] = encode(updated[position], *grid)
        values[row] = decode(codes[row], *grid)
        error = (updated[position] - values[row]) / upper[position, position]
        updated[position + 1 :] -= np.outer(upper[position, position + 1 :], error)
        losses[position] = error @ error
    return Rounded(codes, values, updated[np.argsort(order)], order, parameters, losses.sum())


def find_order(hessian: np.ndarray, act_order: bool | np.ndarray) -> np.ndarray:
    """The order of quantization: as they come, by falling diagonal, or as given."""
    if isinstance(act_order, np.ndarray):
        return act_order
    return np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(hessian))


def group_aware_order(hessian: np.ndarray, group: int) -> np.ndarray:
    """GPTQModel's default: features sorted by falling diagonal inside their group, groups by their largest diagonal."""
    runs = np.diag(hessian).reshape(-1, group)
    inside = np.argsort(-runs, axis=1, kind="stable") + group * np.arange(len(runs))[:, None]
    return inside[np.argsort(-runs.max(axis=1), kind="stable")].reshape(-1)


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """U upper triangular with (H + damping * I)^-1 = U' U."""
    return np.linalg.cholesky(np.linalg.inv(hessian + damping * np.eye(len(hessian)))).T


def integers(bits: int, symmetric: bool) -> tuple[Callable, Callable, Callable]:
    """find, encode, decode of integers: affine (the range holds 0), or symmetric with scale max|w| / (2^(bits - 1) - 1/2)."""
    largest = 2**bits - 1

    def find(rows):
        low, high = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
        if symmetric:
            scale = np.maximum(high, -low) / (largest / 2)
            return np.where(scale == 0, 1, scale), np.full(scale.shape, 2.0 ** (bits - 1))
        scale = (high - low) / largest
        scale = np.where(scale == 0, 1, scale)
        return scale, np.round(-low / scale)

    def encode(row, scale, zero):
        whole = np.floor(zero)  # real zero points are added before rounding
        return np.clip(np.round(row / scale + (zero - whole)) + whole, 0, largest)

    def decode(codes, scale, zero):
        return (codes - zero) * scale

    return find, encode, decode


def codebook(levels: Sequence[float]) -> tuple[Callable, Callable, Callable]:
    """find, encode, decode of sorted levels, the largest magnitude of a group scaled to the largest level."""
    levels = np.array(levels, np.float64)

    def find(rows):
        scale = np.abs(rows).max(axis=0) / np.abs(levels).max()
        return (np.where(scale == 0, 1, scale),)

    def encode(row, scale):
        return np.searchsorted((levels[1:] + levels[:-1]) / 2, row / scale)

    def decode(codes, scale):
        return levels[codes] * scale

    return find, encode, decode


def layer_error(values: np.ndarray, weight: np.ndarray, hessian: np.ndarray) -> float:
    """tr((Q - W)' H (Q - W)): the squared error of the layer's outputs, undamped."""
    difference = values.astype(np.float64) - weight
    return float(np.sum(difference * (hessian.astype(np.float64) @ difference)))


def expected_ratio(hessian: np.ndarray, damp: float, order: np.ndarray | None = None) -> float:
    """Expected damped loss of GPTQ over nearest rounding's: sum(1 / U_ii^2) / tr(H damped) (Chee et al. 2023, 2307.13304)."""
    hessian = hessian.astype(np.float64)
    if order is not None:
        hessian = hessian[np.ix_(order, order)]
    diagonal = np.diag(inverse_factor(hessian, damp * np.mean(np.diag(hessian))))
    return float(np.sum(diagonal**-2.0) / (np.trace(hessian) * (1 + damp)))


def disagreements(rounded: Rounded, codes: np.ndarray, encode: Callable, *, group: int, tolerance: float) -> list[str]:
    """Where `codes` depart from the oracle's other than at a tie, one line a channel; empty where they agree but for ties.

    After a tie that falls the other way an output channel goes its own way, so only its first different code is judged: it must
    be what the oracle's weight rounds to when moved up or down by `tolerance` scales. For static groups, the scale their first
    parameter.
    """
    wrong = []
    for channel in np.flatnonzero(np.any(rounded.codes != codes, axis=0)):
        row = rounded.order[np.flatnonzero(rounded.codes[rounded.order, channel] != codes[rounded.order, channel])[0]]
        grid = tuple(parameter[channel] for parameter in rounded.parameters[row // group])
        moved = [rounded.updated[row, channel] + side * tolerance * grid[0] for side in (-1, 1)]
        if codes[row, channel] not in [encode(value, *grid) for value in moved]:
            wrong.append(f"[{row}, {channel}]: got {codes[row, channel]}, expected {rounded.codes[row, channel]}")
    return wrong

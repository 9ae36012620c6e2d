"""Hadamard matrices: H of +1 and -1 with H H^T = n I, of every order that factors into a power of two and one found here.

    H_2n     [[H_n, H_n], [H_n, -H_n]]     Sylvester 1867
    H_q+1    Paley 1933 (I): q a power of a prime, q = 3 mod 4
    H_2q+2   Paley 1933 (II): the same, q = 1 mod 4
    H_4n     Williamson 1944: [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]] of symmetric circulant matrices
             with A^2 + B^2 + C^2 + D^2 = 4 n I, found by search: 92, 116, 172
    H_12n    such A, B, C and D in the array of Baumert and Hall 1965: 156

Both of Paley's are made of the quadratic character of the field of q elements: chi(a) is 1 where a is a square, -1 where it is
not, 0 for 0. With powers of primes these are 12, 20, 28, 36, 44, 52, 60, 76, 84, 100, 108, 124, 140, 148 and so on. Matrices
are computed in numpy, once, without JAX; `hadamard_transform` goes through the powers of two by sums and differences alone.
"""

import functools
import itertools
from typing import TYPE_CHECKING, Union

import numpy as np
from jaxtyping import Int

from qjax.errors import QjaxError

if TYPE_CHECKING:
    import jax

LARGEST_BASE = 1024  # of what is multiplied with as a matrix
WILLIAMSON = {  # the first half of the first row of A, B, C and D, whose second half mirrors it
    92: ("+--++-+-+-++", "+--+-+-+++++", "+++---++--++", "+--+--+++---"),
    116: ("+-+-++---+--+++", "+-+-+----++-++-", "+--+-++---+++++", "+++-++-++++---+"),
    156: ("++++-+-", "++---+-", "++---+-", "+---+-+"),
    172: ("+++++-++----+-++--++-+", "+++---++--+-+-+-++----", "++-+-++++-+--+--+++--+", "+-++-----++++-+-+++-++"),
}
BAUMERT_HALL = (  # small letters: minus
    *("AAABbCcdBCdd", "AaBabdDcbdcc", "AbaAdDbBcdCc", "BAaaDDDCCbbc", "BdDDAAACcBcB", "BCdDAaCadCBb"),
    *("DcBbAcaABCDd", "cdcdCAaadBbb", "DcbbbCCdAAAD", "dbCCCBBdAaDa", "CbcCDbdbAdaA", "cddCcbBBDAaa"),
)


@functools.cache
def order_of(size: int) -> tuple[int, int] | None:
    """(base, power of two) with base * power = size, and the smallest base that there is a matrix of; None for no such.

    Williamson's are taken where there is no other: saved weights are rotated by 344 of Paley's, not by twice 172.
    """
    odd = size // (size & -size)
    bases = [odd << k for k in range((size // odd).bit_length()) if odd << k <= LARGEST_BASE]
    paley = (base for base in bases if base == 1 or _paley(base) is not None)
    base = next(paley, None) or next((base for base in bases if base in WILLIAMSON), None)
    return None if base is None else (base, size // base)


def require_order(size: int, what: str) -> None:
    """Raises QjaxError for a size without a matrix."""
    if order_of(size) is None:
        raise QjaxError(
            f"{what} has {size} features, of which no Hadamard matrix is known here (sizes are a power of two times 1, 12, 20, "
            "28, 36, 44, ...); take hadamard(block=N) with an N that divides it, or leave the layer out with a rule"
        )


def hadamard(size: int) -> Int[np.ndarray, "size size"]:
    """A Hadamard matrix. Raises QjaxError for a size of which none is known here."""
    require_order(size, "what is to be rotated")
    matrix = base_matrix(order_of(size)[0])
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard_transform(x: Union[np.ndarray, "jax.Array"], *, transposed: bool = False) -> Union[np.ndarray, "jax.Array"]:
    """x H / sqrt(size) of x (..., size), with the matrix that `hadamard` makes, by numpy where x is numpy's; transposed:
    x H^T / sqrt(size), which undoes it.
    """
    size, xp, how = x.shape[-1], np, {}
    if not isinstance(x, np.ndarray):
        import jax

        xp, how = jax.numpy, {"precision": jax.lax.Precision.HIGHEST}
    base, power = order_of(size)
    x, shape = x.reshape(*x.shape[:-1], power, base), x.shape
    if base > 1:
        matrix = base_matrix(base).astype(x.dtype)
        x = xp.matmul(x, matrix.T if transposed else matrix, **how)
    step = 1
    while step < power:
        pairs = x.reshape(*x.shape[:-2], power // (2 * step), 2, step, base)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        x = xp.stack([first + second, first - second], axis=-3).reshape(*x.shape)
        step *= 2
    return (x * np.asarray(size**-0.5, x.dtype)).reshape(shape)


@functools.cache
def base_matrix(order: int) -> Int[np.ndarray, "order order"]:
    """The matrix of a base, which no other base goes into."""
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order in WILLIAMSON:
        return _williamson(order)
    kind, q = _paley(order)
    table = _character_of_differences(q)
    if kind == 1:
        skew = np.block([[np.zeros((1, 1), int), np.ones((1, q), int)], [-np.ones((q, 1), int), table]])
        return (skew + np.eye(order, dtype=int)).astype(np.int8)
    symmetric = np.block([[np.zeros((1, 1), int), np.ones((1, q), int)], [np.ones((q, 1), int), table]])
    return (np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1, dtype=int), [[1, -1], [-1, -1]])).astype(np.int8)


def _williamson(order: int) -> Int[np.ndarray, "order order"]:
    rows = [[1 if sign == "+" else -1 for sign in half] for half in WILLIAMSON[order]]
    n = 2 * len(rows[0]) - 1
    a, b, c, d = (np.array([np.roll([*row, *row[:0:-1]], by) for by in range(n)], np.int8) for row in rows)
    if order == 4 * n:
        return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
    blocks = dict(zip("ABCDabcd", (a, b, c, d, -a, -b, -c, -d), strict=True))
    return np.block([[blocks[letter] for letter in row] for row in BAUMERT_HALL])


def _paley(order: int) -> tuple[int, int] | None:
    """Which of Paley's constructions has this order, and its q."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _prime_power(order - 1):
        return 1, order - 1
    q = order // 2 - 1
    return (2, q) if order % 4 == 0 and q % 4 == 1 and _prime_power(q) else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) of q = p^k with k of at most 3."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p**k == q and p > 1 and all(p % divisor for divisor in range(2, int(p**0.5) + 1)):
            return p, k
    return None


def _character_of_differences(q: int) -> Int[np.ndarray, "q q"]:
    """chi(a - b) of all elements a, b of the field: polynomials below degree k over the integers modulo p, modulo x^k - tail,
    which has no root and so, at degree 2 and 3, no factor.
    """
    p, k = _prime_power(q)
    elements = np.array(list(itertools.product(range(p), repeat=k)))  # coefficients, that of 1 first
    tail = next((t for t in elements if all((x**k - sum(c * x**i for i, c in enumerate(t))) % p for x in range(p))), None)
    product = np.zeros((q, 2 * k - 1), int)
    for i, j in itertools.product(range(k), repeat=2):
        product[:, i + j] += elements[:, i] * elements[:, j]
    for degree in range(2 * k - 2, k - 1, -1):
        product[:, degree - k : degree] += product[:, degree, None] * tail
    numbers = p ** np.arange(k - 1, -1, -1)  # an element's place among them
    squares = np.full(q, -1)
    squares[(product[:, :k] % p) @ numbers] = 1
    squares[0] = 0
    differences = (elements[:, None, :] - elements[None, :, :]) % p
    return squares[differences @ numbers]

"""Statistics of the inputs of a mixture's experts, each from the tokens that were routed to it.

The rule for an expert that calibration hardly reached: where fewer tokens were routed to it than FEWEST of what each would have
were all given as many, its statistics are from all calibration tokens, as if every one had been routed to it. Its row says how
many were (`routed`, beside `tokens`), and the driver warns. None is skipped. (GPTQModel rounds such experts to nearest;
llm-compressor calibrates all experts on all tokens.)
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qjax.calibrate.statistics import COUNT, Statistic, added
from qjax.interception.stacked import is_own

FEWEST = 0.1
ROUTED = "routed"  # beside the statistics of a layer that is an expert: how many tokens were routed to it
Named = Sequence[tuple[str, Statistic]]


class Inputs(NamedTuple):
    """What one call of a stack of layers was given, in the run and in the exact run, and which tokens each layer is for."""

    x: Float[Array, "... in"]
    exact: Float[Array, "... in"]
    routed: Bool[Array, "count ..."]


def stacked(state: object, count: int) -> object:
    """The first state of a statistic of one layer, or several, for so many layers: with a leading axis."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), state)


def update(statistics: Named, states: dict, inputs: Inputs, weights: Float[Array, " tokens"], *, everyone: bool) -> dict:
    """The states after a call. weights: how much each token counts. everyone: for every layer, rather than those it is for."""
    count, dims = inputs.routed.shape[0], inputs.routed.ndim - 1
    counts = jnp.broadcast_to(weights, (count, weights.size))
    counts = counts if everyone else jnp.where(inputs.routed.reshape(count, -1), counts, 0)
    axes = [0 if is_own(x, inputs.routed) else None for x in (inputs.x, inputs.exact)]
    given = [x.reshape(*x.shape[: x.ndim - 1 - dims], -1, x.shape[-1]) for x in (inputs.x, inputs.exact)]
    updates = {name: jax.vmap(functools.partial(added, each), (0, *axes, 0)) for name, each in statistics}
    return {name: update(states[name], *given, counts) for name, update in updates.items()}


def finish(statistics: Named, states: dict, number: int) -> dict[str, Array]:
    """The values of one layer of a stack."""
    return {name: each.finalize(jax.tree.map(lambda leaf: leaf[number], states[name])) for name, each in statistics}


def hardly_reached(states: dict) -> np.ndarray:
    """Numbers of the layers whose statistics are to be taken from all tokens."""
    counts = np.asarray(states[COUNT])
    return np.flatnonzero(counts < max(1, FEWEST * counts.mean()))

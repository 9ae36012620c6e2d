"""Statistics of what goes into the linear layers of a model as it is, block by block."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from flax.traverse_util import flatten_dict
from jaxtyping import Array

from qjax.calibrate.capture import Batch, capture_statistics, sharing
from qjax.calibrate.tokens import as_calibration, weighted_batches
from qjax.models import walk
from qjax.models.model import Model, computing, runnable
from qjax.models.stacks import member


class Inputs(NamedTuple):
    """One input of layers in a block: its readers by path in the model, and statistics by name."""

    block: int
    readers: tuple[str, ...]
    statistics: Mapping[str, Array]


def input_statistics(model: Model, calibration: object, names: Iterable[str]) -> Iterator[Inputs]:
    """Every distinct input of linear layers in the blocks, in their order, over calibration tokens; each expert has its own.

    calibration: as `quantize` takes it; its type, or else the model's, is what the model runs in. Raises QjaxError for tokens
    that are none, and inputs that are not finite.
    """
    given, names = as_calibration(model, calibration), tuple(names)
    states, weights = map(list, zip(*weighted_batches(given), strict=True))
    model = runnable(model, compute=given.compute)
    for part in walk.body(model.config, *computing(model)):
        params = walk.params_of(part, model.params)
        if part.kind == "block":
            yield from _inputs_of(part, params, [Batch((x,), w) for x, w in zip(states, weights, strict=True)], names)
        walk.advance(part.module, params, states)


def _inputs_of(part: walk.Part, params, batches, names: tuple[str, ...]) -> Iterator[Inputs]:
    shared = sharing(part.module, params, batches[0].args)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items() if path in shared}
    stacks = {path: shape[0] for path, shape in shapes.items() if len(shape) > 2}
    needed = {first: shapes[first][-2] for first in dict.fromkeys(shared.values())}
    how = {"prefix": part.prefix, "stacks": {path: count for path, count in stacks.items() if path in needed}}
    found = capture_statistics(part.module, params, batches, needed, names, **how).statistics
    for first in needed:
        readers = [path for path, leader in shared.items() if leader == first]
        for number in range(stacks.get(first, 1)):
            named = [member(path, number) if path in stacks else path for path in readers]
            values = found[member(first, number) if first in stacks else first]
            yield Inputs(walk.block_of(part.prefix), tuple(part.prefix + path for path in named), values)

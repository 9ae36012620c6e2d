"""What goes into the linear layers of a model: how large, how heavy-tailed, how many channels stand out.

largest             max |x| over tokens and channels
kurtosis            mean x^4 / (mean x^2)^2 over both: 3 for normal numbers
outlier_channels    channels with a |x| as large as the threshold: what LLM.int8() would leave in 16 bits
times_median        largest over the median of the channels' largest
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from qjax.calibrate.capture import Batch, capture_statistics, sharing
from qjax.calibrate.tokens import as_calibration
from qjax.models import walk
from qjax.models.model import Model, computing, runnable
from qjax.models.stacks import member

TOKENS = 2048  # run at a time


def input_outliers(model: Model, calibration: object, *, threshold: float = 6.0) -> list[dict[str, object]]:
    """A row for every distinct input of linear layers in the blocks, in their order, over calibration tokens.

    calibration: as `quantize` takes it. Layers with the same input are one row, `layers`, names between commas; each
    expert of a mixture has its own. Raises QjaxError for tokens that are none, and inputs that are not finite.
    """
    tokens = as_calibration(model, calibration).tokens
    model = runnable(model)
    size = max(1, TOKENS // tokens.shape[1])
    states = [jnp.asarray(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    rows = []
    for part in walk.body(model.config, *computing(model)):
        params = walk.params_of(part, model.params)
        if part.kind == "block":
            rows += _rows_of(part, params, [Batch((x,)) for x in states], threshold)
        walk.advance(part.module, params, states)
    return rows


def _rows_of(part: walk.Part, params, batches, threshold) -> list[dict[str, object]]:
    shared = sharing(part.module, params, batches[0].args)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items() if path in shared}
    stacks = {path: shape[0] for path, shape in shapes.items() if len(shape) > 2}
    needed = {first: shapes[first][-2] for first in dict.fromkeys(shared.values())}
    how = {"prefix": part.prefix, "stacks": {path: count for path, count in stacks.items() if path in needed}}
    found = capture_statistics(part.module, params, batches, needed, ["abs_max", "kurtosis"], **how).statistics
    rows = []
    for first in needed:
        readers = [path for path, leader in shared.items() if leader == first]
        for number in range(stacks.get(first, 1)):
            named = [member(path, number) if path in stacks else path for path in readers]
            values = found[member(first, number) if first in stacks else first]
            layers = ",".join(path.removesuffix("/kernel") for path in named)
            rows.append({"block": walk.block_of(part.prefix), "layers": layers} | _figures(values, threshold))
    return rows


def _figures(values: Mapping[str, Array], threshold: float) -> dict[str, object]:
    largest = np.asarray(values["abs_max"])
    return {
        "inputs": len(largest),
        "largest": float(largest.max()),
        "kurtosis": float(values["kurtosis"]),
        "outlier_channels": int((largest >= threshold).sum()),
        "times_median": float(largest.max() / (np.median(largest) or 1.0)),
    }

"""What goes into the linear layers of a model: how large, how heavy-tailed, how many channels stand out.

largest             max |x| over tokens and channels
kurtosis            mean x^4 / (mean x^2)^2 over both: 3 for normal numbers
outlier_channels    channels with a |x| as large as the threshold: what LLM.int8() would leave in 16 bits
times_median        largest over the median of the channels' largest
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array

from qjax.calibrate.inputs import input_statistics
from qjax.models.model import Model


def input_outliers(model: Model, calibration: object, *, threshold: float = 6.0) -> list[dict[str, object]]:
    """A row for every distinct input of linear layers in the blocks, in their order, over calibration tokens.

    calibration: as `quantize` takes it. Layers with the same input are one row, `layers`, names between commas; each
    expert of a mixture has its own. Raises QjaxError for tokens that are none, and inputs that are not finite.
    """
    rows = []
    for given in input_statistics(model, calibration, ("abs_max", "kurtosis")):
        layers = (path.split("/", 1)[1].removesuffix("/kernel") for path in given.readers)
        rows.append({"block": given.block, "layers": ",".join(layers)} | _figures(given.statistics, threshold))
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

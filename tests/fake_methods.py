"""Methods that are smooth functions of weight and statistics, so that drivers can be compared to 1e-5 rather than up to ties.

Their results are held as fp32; registered under "tests.fake_methods:NAME".
"""

import jax.numpy as jnp

from qjax.formats import parse_format
from qjax.maps import Divide
from qjax.qtensor import QTensor
from qjax.rounding.parts.info import Info


def shrink(weight, hessian, abs_mean, numpy=jnp):
    """The arithmetic of `fake`, for NumPy too: moves the weight by something of each statistic."""
    mean = numpy.trace(hessian) / len(weight)
    return 0.8 * weight - 0.2 * hessian @ weight / mean + 0.02 * abs_mean[:, None] / numpy.max(abs_mean)


def fake(weight, fmt, *, hessian, abs_mean):
    """A rounding that reads two statistics."""
    del fmt
    changed = shrink(weight.astype(jnp.float32), hessian, abs_mean)
    return QTensor(changed, None, None, parse_format("fp32"), len(weight)), Info(jnp.float32(0), jnp.float32(0))


def stretch(weights, fmt, *, abs_mean):
    """A transform whose scales are powers of two, which every type holds exactly."""
    del weights, fmt
    return Divide(powers(abs_mean))


def powers(abs_mean, numpy=jnp):
    """The arithmetic of `stretch`."""
    return 2.0 ** numpy.clip(numpy.round(numpy.log2(abs_mean)), -6, 6)

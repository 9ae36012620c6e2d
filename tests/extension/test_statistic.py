"""A statistic of one's own, a method that asks for it, and one that takes a factor without having damp among its options."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.statistics import Mean
from qjax.errors import QjaxError
from tests.extension.common import sweep

pytestmark = pytest.mark.usefixtures("registries")

fourth = qjax.Statistic(  # mean x^4 of every input
    init=lambda size: Mean(jnp.zeros(size), jnp.zeros(())),
    update=lambda state, x, exact, w: Mean(state.total + w @ x**4, state.weight + jnp.sum(w)),
    finalize=Mean.value,
    axes=1,
)


def test_a_statistic_and_the_method_that_asks_for_it(tmp_path):
    seen = {}
    qjax.register_statistic("fourth", fourth)

    @qjax.register
    def heavy(weight, fmt, *, fourth, power: float = 1.0):
        """Nearest rounding that leaves out what is too small to matter."""
        seen[weight.shape] = fourth
        return qjax.rtn(jnp.where((fourth > 0)[:, None], weight, power * weight), fmt)

    rows = sweep(tmp_path, "heavy:int4-g16@parallel", "rtn:int4-g16")
    assert rows["heavy:int4-g16@parallel"]["perplexity"] == rows["rtn:int4-g16"]["perplexity"]
    assert set(seen) == {(32, 32), (32, 16), (32, 48), (48, 32)}
    assert all(value.shape == shape[:1] and np.all(np.asarray(value) > 0) for shape, value in seen.items())


def test_a_factor_without_damp(tmp_path):
    """By factorize's own defaults; the Hessian that it is made from is captured unasked."""

    @qjax.register
    def pivotal(weight, fmt, *, factor, least: float = 0.0):
        """Nearest rounding of inputs whose pivot is large enough."""
        assert factor.pivots.shape == weight.shape[:1]
        return qjax.rtn(jnp.where(factor.pivots.min() > least, weight, 0), fmt)

    rows = sweep(tmp_path, "pivotal:int4-g16@sequential", "rtn:int4-g16")
    assert rows["pivotal:int4-g16@sequential"]["perplexity"] == rows["rtn:int4-g16"]["perplexity"]
    assert rows["pivotal:int4-g16@sequential"]["order"] == "sequential"


@pytest.mark.parametrize("name", ["hessian", "tokens", "factor", "Fourth"])
def test_names_that_are_taken(name):
    with pytest.raises(QjaxError, match=r"already|is no name"):
        qjax.register_statistic(name, fourth)

"""qjax.models.decoder: what the parity tests against other libraries do not see."""

import jax
import numpy as np
import pytest

from qjax.models.config import LinearScaling, Llama3Scaling
from qjax.models.decoder import rope_frequencies

from .conftest import tiny_config

HALF = 64


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [None, LinearScaling(3.0), Llama3Scaling(8.0, 1.0, 4.0, 8192)])
def test_rotary_frequencies_are_the_nearest_float32(theta, scaling):
    """To the last bit, whatever the backend: one bit of frequency is a visible angle at position 10^5."""
    expected = np.array([theta ** (-i / HALF) for i in range(HALF)])
    if isinstance(scaling, LinearScaling):
        expected /= 3
    if scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192):
        keep = np.clip((8192 * expected / (2 * np.pi) - 1) / 3, 0, 1)
        expected *= keep + (1 - keep) / 8
    found = rope_frequencies(tiny_config(head_dim=2 * HALF, rope_theta=theta, rope_scaling=scaling))
    assert not isinstance(found, jax.Array)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2**-24)

"""qjax.rounding.parts.pieces: the same result however a weight is cut."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.rounding.parts import pieces


@pytest.mark.parametrize("shape", [(1, 12, 4), (6, 4, 2), (5, 7, 3), (3, 1, 1)])
@pytest.mark.parametrize("piece", [1, 4, 10, 24, 10**6])
def test_any_piece_size_gives_the_same(monkeypatch, shape, piece):
    monkeypatch.setattr(pieces, "PIECE", piece)
    groups = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    mask = np.arange(shape[0] * shape[1]).reshape(*shape[:2], 1) % 3 > 0
    scale = np.random.default_rng(1).standard_normal((shape[0], shape[2])).astype(np.float32)
    seen = []

    def function(values, mask, scale, nothing):
        assert nothing is None
        seen.append(values.shape)
        assert mask.shape == (values.shape[0], 1)
        return values * scale, jnp.sum(values * mask, axis=0)

    product, total = pieces.map_pieces(function, (jnp.asarray(groups), jnp.asarray(mask)), (jnp.asarray(scale), None))
    np.testing.assert_array_equal(product.reshape(shape), groups * scale[:, None])
    np.testing.assert_allclose(total.sum(axis=1), (groups * mask).sum(axis=1), rtol=1e-5, atol=1e-6)
    rows, columns = seen[0]
    assert columns == shape[2]
    assert shape[1] % rows == 0
    assert rows * columns <= max(piece, columns), "a piece is no larger than asked but for whole rows"


def test_a_scale_shared_by_all_columns():
    groups = jnp.arange(24.0).reshape(1, 6, 4)
    result = pieces.map_pieces(lambda values, scale: values * scale, (groups,), (jnp.full((1, 1), 2.0),))
    np.testing.assert_array_equal(result.reshape(1, 6, 4), groups * 2)

"""Peak memory of loading models whose layers are in codes: them, and a constant."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints import packed
from qjax.checkpoints.export import export
from qjax.checkpoints.leaves import blank
from qjax.formats import parse_format
from qjax.models.model import Model
from qjax.models.parameters import parameter_shapes, unflatten
from tests.conftest import tiny_config
from tests.test_huggingface import peak_bytes

SIZES = {"vocabulary_size": 8000, "hidden_size": 2048, "mlp_size": 5632, "heads": 32, "kv_heads": 32, "head_dim": 64}
CONSTANT = 200_000_000  # bytes: programs that unpack, what allocators keep, and the largest tensor's


def coded_model(name: str, layers: int) -> tuple[Model, int]:
    """A model whose blocks have codes of a format, and its bytes; values repeat, since none is computed with."""
    generator = np.random.default_rng(0)
    codes, numbers = generator.integers(0, 256, 2**20, np.uint8), generator.uniform(0.5, 1, 2**20).astype(np.float32)

    def filled(each: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(np.resize(codes if each.dtype == np.uint8 else numbers, each.shape), each.dtype)

    config, fmt, leaves = tiny_config(layers=layers, **SIZES), parse_format(name), {}
    for path, shape in parameter_shapes(config).items():
        in_codes = path.startswith("block_") and path.endswith("kernel")
        leaves[path] = jax.tree.map(filled, blank(fmt, *shape) if in_codes else jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    return Model(config, unflatten(leaves), None, "random"), sum(leaf.nbytes for leaf in leaves.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("to", "fmt"),
    [("gptq", "int4-g128"), ("bitsandbytes", "nf4-b64-dq"), ("gguf", "int4-g32-k6m-k6"), ("packed", "int4-g128")],
)
def test_peak_memory_is_the_model_and_a_constant(to, fmt, tmp_path):
    """Of 330 to 360 MB: no second model, and none in more bits."""
    model, size = coded_model(fmt, layers=10)
    place = tmp_path / ("a.gguf" if to == "gguf" else "a")
    if to == "packed":
        packed.save(place, model)
    else:
        export(place, model, to)
    peak = peak_bytes(place)
    print(f"{to}: {size / 1e6:.0f} MB, at most {peak / size:.2f} times")
    assert 320e6 < size < peak < size + CONSTANT

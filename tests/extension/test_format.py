"""A table of values and a type of scales of one's own, through every rounding, files, tables and figures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import registry
from qjax.errors import QjaxError
from qjax.scales import Floats
from tests.extension.common import sweep, tiny_model

pytestmark = pytest.mark.usefixtures("registries")
NF3 = (-1.0, -0.5, -0.25, 0.0, 0.15, 0.35, 0.6, 1.0)


@dataclasses.dataclass(frozen=True)
class HalvesUp(Floats):
    """float16 scales rounded up to a power of two, so that nothing is cut off."""

    dtype: str = "float16"

    def find(self, exact, largest, bound, mantissa):
        return jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(exact, 1e-7))))


def test_formats_from_outside(tmp_path):
    qjax.register_codebook("nf3", NF3)
    qjax.register_scales("up", HalvesUp())
    assert qjax.parse_format("nf3-g16-up").bits_per_weight(64, 64) == 3 + 16 / 16
    recipes = ("rtn:nf3-g16", "gptq+descend:nf3-g16-up@parallel", "awq:int4-g16-up@parallel")
    rows = sweep(tmp_path / "rows", *recipes)
    assert rows["rtn:nf3-g16"]["bits"] == 3 and rows["rtn:nf3-g16"]["method"] == "nf3"
    model, _ = qjax.quantize(tiny_model(), "rtn(clip=mse):nf3-g16-up")
    leaf = model.params["block_0"]["mlp"]["up"]["kernel"]
    scales = np.unique(np.asarray(leaf.scales, np.float32))
    np.testing.assert_array_equal(np.log2(scales), np.round(np.log2(scales)))
    weight = np.asarray(tiny_model().params["block_0"]["mlp"]["up"]["kernel"], np.float64)
    scale, values = np.asarray(leaf.scales, np.float64)[:, None], np.array(NF3)
    nearest = values[np.abs((weight.reshape(2, 16, -1) / scale)[..., None] - values).argmin(axis=-1)] * scale
    np.testing.assert_allclose(qjax.dequantize(leaf), nearest.reshape(weight.shape), atol=1e-6)
    qjax.save(tmp_path / "packed", model)
    jax.tree.map(np.testing.assert_array_equal, qjax.load(tmp_path / "packed").params, model.params)


@pytest.mark.parametrize(
    ("register", "name", "given"),
    [
        ("register_codebook", "nf4", NF3),
        ("register_codebook", "int4", NF3),
        ("register_codebook", "nf3x", NF3[:7]),
        ("register_codebook", "nf3x", NF3[::-1]),
        ("register_codebook", "NF3", NF3),
        ("register_scales", "dq", HalvesUp()),
        ("register_scales", "g64", HalvesUp()),
        ("register_scales", "sym", HalvesUp()),
    ],
)
def test_what_cannot_be_registered(register, name, given):
    with pytest.raises(QjaxError, match=register):
        getattr(qjax, register)(name, given)


def test_a_name_means_one_thing_as_long_as_the_process_lives():
    """What was compiled for a format knows it by its name."""
    with registry.scoped():
        qjax.register_codebook("once", NF3)
        qjax.register_scales("once", HalvesUp())
    for register, other, same in (("codebook", (*NF3[:3], 0.1, *NF3[4:]), NF3), ("scales", HalvesUp("float32"), HalvesUp())):
        with pytest.raises(QjaxError, match=f"register_{register}: 'once' had other values earlier in this process"):
            getattr(qjax, f"register_{register}")("once", other)
        getattr(qjax, f"register_{register}")("once", same)
    assert str(qjax.parse_format("once-g16-once")) == "once-g16-once"

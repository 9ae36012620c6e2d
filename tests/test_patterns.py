"""Names of modules as people type them in rules, and the one spelling that results know them by."""

import numpy as np
import pytest

import qjax
from qjax.driver.patterns import meant
from qjax.driver.placement import in_our_words, parse_rule, placement
from qjax.models.config import DecoderConfig
from qjax.models.families import FAMILIES, module_names, read_config
from qjax.models.model import Model
from qjax.models.parameters import parameter_shapes, unflatten
from qjax.models.walk import block_of
from qjax.sweep.runner import AS_IT_IS, Sweep, Treatment, _cells
from tests.conftest import FAMILY_CHANGES, byte_tokenizer, tiny_config
from tests.family_files import EVERY

KINDS = ("attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down")
KERNELS = [f"block_{i}/{kind}/kernel" for i in range(12) for kind in KINDS] + ["head/output/kernel"]
LLAMA = module_names("llama", KERNELS)


def zeros(config: DecoderConfig) -> Model:
    """A model that is cheap to make."""
    leaves = {path: np.zeros(shape, np.float32) for path, shape in parameter_shapes(config).items()}
    return Model(config, unflatten(leaves), byte_tokenizer(), "zeros")


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("mlp/down", "mlp/down"),  # finds paths as it is: never changed, keys of earlier rows neither
        ("block_1", "block_1"),
        ("mlp", "mlp"),
        ("down_proj", "mlp/down"),
        ("mlp.down_proj", "mlp/down"),
        ("down_proj.weight", "mlp/down"),
        ("re:.*down_proj", "mlp/down"),
        ("DOWN_PROJ", "mlp/down"),
        ("MLP/Down", "mlp/down"),
        ("lm_head", "head/output"),
        ("self_attn", "attention/k|attention/o|attention/q|attention/v"),
        ("gate_proj|up_proj", "mlp/gate|mlp/up"),
        ("model.layers.1.mlp.down_proj", "block_1/mlp/down"),
        (r"model\.layers\.1\.mlp\.down_proj", "block_1/mlp/down"),
        ("layers.1", "^block_1/"),  # not layers 10 and 11
        (r"layers\.(1|11)\.", "^block_1/|^block_11/"),
        (r"layers\.[01]\..*[qk]_proj", "block_0/attention/k|block_0/attention/q|block_1/attention/k|block_1/attention/q"),
        ("sideways_proj", "sideways_proj"),
    ],
)
def test_names_of_modules_are_known_by_our_paths(typed, known):
    assert meant(typed, KERNELS, LLAMA) == known
    assert meant(known, KERNELS, LLAMA) == known


def test_without_names_case_alone_is_ignored_where_nothing_is_found_as_it_is():
    assert meant("conv", ["Conv_0/kernel", "Dense_0/kernel"]) == "(?i)conv"
    assert meant("conv", ["conv_in/kernel", "Conv_0/kernel"]) == "conv"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_has_a_name_in_every_family(family):
    model = zeros(read_config(EVERY[family]))
    kernels = list(placement(model, None))
    names = module_names(family, kernels)
    assert list(names) == kernels
    for path, name in names.items():
        (rule,) = in_our_words(model, [parse_rule(f"{name}=none")])
        placed = placement(model, "rtn:int4-g16", [rule])
        left = [other for other in kernels if placed[other] is None and block_of(other) is not None]
        assert left == [other for other in kernels if names[other] == name and block_of(other) is not None], path


def test_fused_names_stand_for_all_that_is_stored_there():
    model = zeros(tiny_config(**FAMILY_CHANGES["gpt2"]))
    quantized, _ = qjax.quantize(model, "none", rules=["c_attn=none", "h.0.mlp.c_proj=bf16"])
    assert quantized.recipe == "none; attention/k|attention/q|attention/v=none; block_0/mlp/down=bf16"
    types = [str(quantized.params[block]["mlp"]["down"]["kernel"].dtype) for block in ("block_0", "block_1")]
    assert types == ["bfloat16", "float32"]


def test_equal_rules_are_equal_cells():
    corpus = qjax.Corpus("tale", ("a tale of two cities " * 20,), "f" * 16)
    cells = []
    for rule in ("mlp/down=rtn:int8-g16", "down_proj=rtn:int8-g16"):
        sweep = Sweep(("rtn:int4-g16",), (corpus,), qjax.parse_convention("windows-32"), 1, (rule,))
        cells.append([cell.treatment for cell in _cells(zeros(tiny_config()), sweep)])
    assert cells[0] == cells[1] == [AS_IT_IS, Treatment("rtn:int4-g16", ("mlp/down=rtn:int8-g16",))]


@pytest.mark.parametrize(
    ("changes", "rule", "said"),
    [
        ({}, "down_prj=none", "did you mean down_proj"),
        ({}, "mlp/dwon=none", r"did you mean down\?"),
        ({"tied": True}, "lm_head=none", "a head that is tied to the embedding"),
        ({}, "input_layernorm=none", "embeddings and norms have no kernel"),
    ],
)
def test_what_matches_nothing_is_told_why(changes, rule, said):
    with pytest.raises(qjax.QjaxError, match=f"rule '{rule}' matches no kernel.*{said}"):
        placement(zeros(tiny_config(**changes)), "rtn:int4-g16", [rule])

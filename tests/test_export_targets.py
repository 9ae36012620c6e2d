"""checkpoints/target*.py: what each target writes of a layer its reader reads as the same codes, scales and zero points."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.checkpoints import export
from qjax.checkpoints.modules import Module, pack
from qjax.checkpoints.quantized import METHODS
from qjax.checkpoints.target import Codes
from qjax.checkpoints.target_bitsandbytes import _scb
from qjax.checkpoints.targets import TARGETS
from qjax.checkpoints.tensors import read_headers, read_tensor, write_tensors
from qjax.cli.export import GGUF
from qjax.cli.export import TARGETS as NAMES
from qjax.formats import parse_format
from qjax.linear import Linear
from tests.test_export import assert_same_scales, random_scales

FORMATS = {
    "gptq": ("int4-g16-sym", "int3-g32", "int8-channel", "int2-g16"),
    "gptq_v2": ("int4-g16", "int3-g32-sym-full", "int8-g32"),
    "compressed-tensors": ("int4-g16-bf16", "int5-channel-sym", "int3-g32"),
    "awq": ("int4-g16", "int4-channel", "int4-g32-sym-max", "int4-g16-sym-full"),
    "bitsandbytes": (
        "nf4-b32",
        "nf4-g64",
        "nf4-b64-dq",
        "fp4_bnb-b128",
        "fp4_bnb-g32-dq",
        "nf4-g32-fp16",
        "int8-channel-sym-max",
    ),
}


def test_the_command_names_every_target():
    """It knows them without JAX, so it has names of its own."""
    assert (*TARGETS, export.GGUF) == NAMES and GGUF == export.GGUF


def read_back(to, layer):
    """A layer as the reader of a target's files makes it."""
    target, shape = TARGETS[to], layer.codes.shape
    assert target.refusal(layer.format, shape, layer.order is not None) is None
    said = target.settings({"a.m": (layer.format, layer.order is not None)}, ["head"], layer.dtype)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        write_tensors(file, target.store(layer))
        module = Module("a.m", shape, read_headers([file]))
        stored = METHODS[said["quant_method"]](said)(module)
        for suffix, (expected, types) in stored.expected.items():
            assert module.headers[suffix].shape == expected and module.headers[suffix].dtype in types, suffix
        assert module.headers.keys() == {*stored.expected, *stored.optional}
        return stored.make({suffix: read_tensor(module.headers[suffix]) for suffix in stored.expected})


@pytest.mark.filterwarnings("ignore:the checkpoint's weights are read")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reading_is_the_inverse_of_writing(data):
    to = data.draw(st.sampled_from(list(FORMATS)))
    fmt = parse_format(data.draw(st.sampled_from(FORMATS[to])))
    rows, columns = (data.draw(st.integers(1, 3)) * size for size in (64 if fmt.is_flat else max(fmt.group, 32), 32))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = generator.integers(0, fmt.largest_code + 1, (rows, columns)).astype(np.uint8)
    groups = fmt.parameter_shape(rows, columns)
    zeros = generator.integers(to == "gptq", 2**fmt.bits, groups).astype(np.uint8) if fmt.is_affine else None
    scales, ordered = random_scales(groups, fmt, generator), to.startswith("gptq") and data.draw(st.booleans())
    order = generator.permutation(rows) if ordered else None
    leaf = read_back(to, Codes(codes, scales, zeros, fmt, order, "float32"))
    if ordered:  # the order within a group is not the file's; of one group there is none
        of_file = np.asarray(leaf.inputs[0].index) if isinstance(leaf, Linear) else np.arange(rows)
        codes = codes[np.argsort(order)][of_file]
        in_groups = [np.sort(each.reshape(len(scales), -1)) for each in (of_file, order)]
        np.testing.assert_array_equal(*in_groups)
        leaf = leaf.weight if isinstance(leaf, Linear) else leaf
    np.testing.assert_array_equal(leaf.codes, pack(codes.T, fmt.bits).T)
    assert_same_scales(scales, leaf.scales)
    if zeros is not None:
        np.testing.assert_array_equal(leaf.zeros, pack(zeros, fmt.bits))
    elif leaf.zeros is not None:  # awq's files always have them
        np.testing.assert_array_equal(leaf.zeros, pack(np.full(groups, 8, np.uint8), 4))


def test_int8_scales_that_are_floats_of_32_bits_move_by_their_last_bit_at_most():
    scales = np.random.default_rng(0).uniform(1e-3, 1e-1, 10_000).astype(np.float32)
    back = _scb(scales) * np.float32(7.874015718698502e-3)
    moved = back.view(np.int32) - scales.view(np.int32)
    assert np.abs(moved).max() == 1 and 0 < (moved != 0).mean() < 0.02
    again = _scb(back) * np.float32(7.874015718698502e-3)
    np.testing.assert_array_equal(again, back)

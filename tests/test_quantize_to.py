"""quantize_to: part by part into a folder, gone on with after a stop, and to the last bit what `quantize` and `save` give."""

import jax
import numpy as np
import pytest

import qjax
from qjax.errors import QjaxError
from qjax.models.parameters import flatten
from tests.conftest import byte_tokenizer, random_model, tiny_config


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model, in memory and as a folder, and calibration tokens."""
    model = random_model(tiny_config(), byte_tokenizer())
    folder = tmp_path_factory.mktemp("model") / "float"
    qjax.save(folder, model)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32)
    return model, folder, tokens


def equal(model, other):
    ours, theirs = flatten(model.params), flatten(other.params)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(theirs[path]), strict=True):
            assert a.dtype == b.dtype, path
            np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize(
    ("recipe", "compute"),
    [
        *(("awq+gptq:int3-g16@qep", None), ("awq+gptq:int3-g16@parallel", None), ("bf16", None)),
        ("awq+gptq:int3-g16@qep", "bfloat16"),
    ],
)
def test_it_goes_on_where_it_was_stopped(case, tmp_path, recipe, compute):
    model, source, tokens = case
    tokens = qjax.Calibration(tokens, compute=compute)
    rules = () if recipe == "bf16" else ("mlp/down=rtn:int8-g16/int8-token", "head=nf4-g32-dq")
    expected, report = qjax.quantize(model, recipe, calibration=tokens, rules=rules)
    seen = []

    def stop(record):
        seen.append(record.path)
        if len(seen) == 10:
            raise Stopped

    asked = {"calibration": tokens, "rules": rules}
    with pytest.raises(Stopped):
        qjax.quantize_to(tmp_path / "out", qjax.load(source, lazy=True), recipe, on_layer=stop, **asked)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    with pytest.raises(QjaxError, match="something else"):
        qjax.quantize_to(tmp_path / "out", model, "rtn:int8-g16")
    if compute:
        with pytest.raises(QjaxError, match="something else"):
            qjax.quantize_to(tmp_path / "out", model, recipe, calibration=tokens._replace(compute=None), rules=rules)
    got, again = qjax.quantize_to(tmp_path / "out", qjax.load(source, lazy=True), recipe, **asked)
    assert not (tmp_path / ".out.partial").exists()
    equal(expected, got)
    equal(expected, qjax.load(tmp_path / "out"))
    assert got.recipe == expected.recipe and again[1:4] == report[1:4]
    for ours, theirs in zip(again.layers, report.layers, strict=True):
        assert ours._replace(seconds=0) == theirs._replace(seconds=0)

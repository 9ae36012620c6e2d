"""qjax.models.compute: what a model runs in, from the name to the products."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import qjax
from qjax.calibrate import experts
from qjax.calibrate.statistics import STATISTICS
from qjax.errors import QjaxError
from qjax.evaluate.generate import generate
from qjax.evaluate.perplexity import score
from qjax.interception.linen import recorded
from qjax.kernels import integers
from qjax.lazy import materialised
from qjax.linear import Linear, apply_linear
from qjax.models import walk
from qjax.models.compute import NAMES, compute_name, compute_of
from qjax.models.model import apply, empty_caches, hidden_states, runnable
from qjax.report.tables import distinctions
from qjax.rounding.nearest import rtn
from qjax.sweep.request import find_row, request_of
from qjax.sweep.rows import complete
from tests.conftest import random_model, tiny_config
from tests.test_cli import fails

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 9 % 257
CALIBRATION = np.asarray(jax.random.randint(jax.random.key(5), (8, 32), 0, 257), np.int32)
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU does")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


def products(function, *args) -> list[tuple[str, str, str]]:
    """(type of the left, of the right, of the result) of every product that a function computes."""

    def found(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield tuple(str(each.aval.dtype) for each in (*equation.invars, *equation.outvars))
            for inner in jaxprs_in_params(equation.params):
                yield from found(inner)

    return list(found(jax.make_jaxpr(function)(*args).jaxpr))


def test_names():
    assert compute_of("float32") == compute_of(None) == (jnp.float32, None)
    assert compute_of("bfloat16") == (jnp.float32, jnp.bfloat16)
    assert [compute_name(name) for name in (None, "float32", "bfloat16")] == ["float32", "float32", "bfloat16"]
    with pytest.raises(QjaxError, match="compute 'bf16': allowed are float32, bfloat16"):
        qjax.Sweep((), (), None, compute="bf16")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("eval", "--compute"), ("generate", "--compute"), ("sweep", "--compute")),
        *((command, "--calibration-compute") for command in ("quantize", "sweep", "sensitivity", "generate", "tune")),
    ],
)
def test_an_unknown_type_is_one_error(command, option, capsys):
    assert f"{option}: compute 'half': allowed are float32, bfloat16" in fails(capsys, command, "bundled", option, "half")


@pytest.mark.parametrize("changes", [{}, {"experts": 4, "experts_per_token": 2}, {"tied": True}])
def test_every_product_rounds_its_inputs_and_sums_in_float32(changes):
    """But a router's; hidden states are float32."""
    model = random_model(tiny_config(**changes))
    lowered = runnable(model, compute="bfloat16")
    found = products(lambda tokens: apply(lowered, tokens), TOKENS)
    exact = [each for each in found if each[0] == "float32"]
    assert len(exact) == (model.config.layers if changes.get("experts") else 0)
    assert {each for each in found if each not in exact} == {("bfloat16", "bfloat16", "float32")}
    assert {each[0] for each in products(lambda tokens: apply(model, tokens), TOKENS)} == {"float32"}
    assert hidden_states(lowered, TOKENS).dtype == jnp.float32


def test_it_is_another_figure_near_the_first(model):
    """As asked for in the call or by the model, decoded first or not; nearer than with 8-bit weights and inputs."""
    exact, lowered = score(model, TOKENS), score(model, TOKENS, compute="bfloat16")
    rounded = score(qjax.quantize(model, "rtn:int8-channel/int8-token")[0], TOKENS)
    assert 0 < np.sum((lowered - exact) ** 2) < np.sum((rounded - exact) ** 2)
    np.testing.assert_array_equal(score(model._replace(compute="bfloat16"), TOKENS), lowered)
    np.testing.assert_array_equal(score(model._replace(compute="bfloat16"), TOKENS, compute="float32"), exact)
    np.testing.assert_array_equal(score(runnable(model, compute="bfloat16"), TOKENS), lowered)


def test_layers_that_round_their_inputs_keep_what_they_compute(monkeypatch):
    monkeypatch.setattr(integers, "pays_decoded", lambda: False)
    x, w = jax.random.normal(jax.random.key(0), (3, 64)), jax.random.normal(jax.random.key(1), (64, 8))
    quantized, _ = rtn(w, "int8-channel-sym")
    leaf = Linear(quantized, activation="int8-token")
    params = {"a": {"kernel": leaf}, "b": {"kernel": quantized}}
    run = runnable(random_model(tiny_config())._replace(params=params), compute="bfloat16")
    held = run.params["a"]["kernel"].weight.dtype, run.params["b"]["kernel"].dtype
    assert held == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(apply_linear(x, leaf, products=jnp.bfloat16), apply_linear(x, leaf))
    lowered = apply_linear(x, w, products=jnp.bfloat16)
    assert lowered.dtype == jnp.float32
    both = (np.asarray(each.astype(jnp.bfloat16), np.float64) for each in (x, w))
    np.testing.assert_allclose(lowered, np.matmul(*both), rtol=1e-5, atol=1e-5)


def test_caches_hold_what_products_read(model):
    lowered = model._replace(compute="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(empty_caches(lowered, 1, 8))} == {jnp.dtype(jnp.bfloat16)}
    found = generate(lowered, [TOKENS[0]], 4)
    tokens = list(TOKENS[0])
    for token in found.tokens[0]:
        logits = apply(lowered, np.array([tokens]))[0, -1]
        assert logits[token] > jnp.max(logits) - 1e-3
        tokens.append(token)


@pytest.mark.parametrize("changes", [{}, {"experts": 4, "experts_per_token": 2}])
def test_calibration_sees_what_layers_multiply(changes):
    """Inputs rounded to bfloat16, as evaluation multiplies them; those of layers that round or map theirs as they come."""
    model = random_model(tiny_config(**changes))
    part = walk.parts(model.config, *compute_of("bfloat16"))[1]
    params, x = walk.params_of(part, model.params), jax.random.normal(jax.random.key(0), (2, 12, model.config.hidden_size))
    with recorded(products=jnp.bfloat16) as recording:
        shown = part.module.apply({"params": params}, x)
    assert len(recording.inputs) == 7
    assert {each.dtype for inputs in recording.inputs.values() for each in inputs} == {jnp.dtype(jnp.bfloat16)}
    evaluated, exact = walk.compiled(part.module)(params, x), walk.compiled(part.module.copy(products=None))(params, x)
    assert 20 * np.mean(np.square(shown - evaluated)) < np.mean(np.square(shown - exact))
    rounding = qjax.quantize(model, "rtn:int8-channel/int8-token", rules=["(q|gate)/kernel$=none"])[0]
    with recorded(products=jnp.bfloat16) as recording:
        part.module.apply({"params": walk.params_of(part, rounding.params)}, x)
    kinds = {path.split("/")[1]: inputs[0].dtype.name for path, inputs in recording.inputs.items()}
    lowered = dict.fromkeys(("q", "gate"), "bfloat16")
    assert kinds == dict.fromkeys(("k", "v", "o", "up", "down"), "float32") | lowered


@pytest.mark.parametrize("recipe", ["gptq:int4-g16@parallel", "gptq:int4-g16@qep", "awq(loss=module):int4-g16@sequential"])
def test_calibration_runs_in_it(model, recipe, tmp_path):
    """What is told of layers is near that of float32, and not equal; what evaluation runs in changes nothing."""
    made, given = functools.partial(qjax.quantize, recipe=recipe), qjax.Calibration(CALIBRATION)
    leaves = lambda quantized: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(quantized.params)]  # noqa: E731
    (exact, of_exact), (lowered, of_lowered) = (made(model, calibration=given._replace(compute=each)) for each in NAMES)
    assert leaves(made(model._replace(compute="bfloat16"), calibration=given)[0]) == leaves(exact) != leaves(lowered)
    means = (np.mean([each.output_error for each in report.layers if each.output_error]) for report in (of_exact, of_lowered))
    np.testing.assert_allclose(*means, rtol=0.05)
    packed, _ = qjax.quantize_to(tmp_path / "packed", model, recipe, calibration=given._replace(compute="bfloat16"))
    assert leaves(packed._replace(params=materialised(packed.params))) == leaves(lowered)
    with pytest.raises(QjaxError, match="compute 'half': allowed are float32, bfloat16"):
        made(model, calibration=given._replace(compute="half"))


def test_what_layers_are_given_is_told_in_it(model):
    given = qjax.Calibration(CALIBRATION)
    exact, lowered = (qjax.input_outliers(model, given._replace(compute=each)) for each in NAMES)
    assert exact == qjax.input_outliers(model, given) != lowered
    assert lowered == qjax.input_outliers(model._replace(compute="bfloat16"), given)


def test_experts_have_hessians_of_bfloat16_inputs():
    """Those that vmap makes, of an input for all and of one for each."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 40)).astype(jnp.bfloat16)
    routed, named = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 5)), (("hessian", STATISTICS["hessian"]),)
    for given in (x[0, 0], x[0]):
        first = {"hessian": experts.stacked(STATISTICS["hessian"].init(40), 3)}
        found, exact = (
            experts.update(named, first, experts.Inputs(each, each, routed), jnp.ones(5), everyone=False)["hessian"].total
            for each in (given, given.astype(jnp.float32))
        )
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_blocks_are_refined_in_it():
    model, recipe = random_model(tiny_config(layers=1)), "rtn+block_ap(steps=4):int3-g16@block"
    made = [qjax.quantize(model, recipe, calibration=qjax.Calibration(CALIBRATION, compute=each)) for each in NAMES]
    losses = [[record.block_loss_after for record in report.layers if record.block_loss_after] for _, report in made]
    assert losses[0] != losses[1] and len(losses[0]) == len(losses[1]) > 0
    np.testing.assert_allclose(*map(np.mean, losses), rtol=0.2)


def test_rows_say_what_they_were_calibrated_in(tiny_model, tmp_path):
    """They are cells of their own; null stands for the device's own type, and for rows from before there was a choice."""
    text = qjax.Corpus("t", tuple(" ".join(map(str, range(i, i + 60))) for i in range(3)))
    tokens = qjax.Calibration(np.arange(64, dtype=np.int32).reshape(2, 32))
    sweep = qjax.Sweep(("rtn:int4-g16", "gptq:int4-g16"), (text,), qjax.parse_convention("windows-16"), max_windows=2)
    rows = {}
    for each in NAMES:
        asked = dataclasses.replace(sweep, calibration=tokens._replace(compute=each))
        rows[each] = qjax.run_sweep(tiny_model, asked, tmp_path)
    assert [row["calibration_compute"] for row in rows["bfloat16"]] == [None, None, "bfloat16"]
    assert [row["calibration_compute"] for row in rows["float32"]] == [None, None, None]
    keys = {name: [row["key"] for row in found] for name, found in rows.items()}
    assert keys["float32"][:2] == keys["bfloat16"][:2] and keys["float32"][2] != keys["bfloat16"][2]
    assert rows["float32"][2]["output_error"] != rows["bfloat16"][2]["output_error"]
    before, lowered = rows["float32"][2], rows["bfloat16"][2]
    old = complete({name: value for name, value in before.items() if name != "calibration_compute"} | {"key": "old"})
    assert find_row([old, before], before["recipe"], "rows") is before  # one cell
    with pytest.raises(QjaxError, match=r"2 rows of rows are .* in bfloat16"):
        find_row([before, lowered], before["recipe"], "rows")
    told = [{column.key for column in distinctions(pair)} for pair in ([old, before], [before, lowered])]
    assert [("calibration_compute" in each) for each in told] == [False, True]


def test_rows_say_what_they_were_run_in(tiny_model, tmp_path):
    """The type is part of the key; codes do not depend on it; a row is measured again in its own type."""
    text = qjax.Corpus("t", tuple(" ".join(map(str, range(i, i + 60))) for i in range(3)))
    run = lambda **how: qjax.run_sweep(  # noqa: E731
        tiny_model,
        qjax.Sweep(("rtn:int4-g16",), (text,), qjax.parse_convention("windows-16"), max_windows=2, **how),
        tmp_path,
    )
    exact, again, lowered = run(), run(compute="float32"), run(compute="bfloat16")
    assert [row["key"] for row in exact] == [row["key"] for row in again]
    assert not {row["key"] for row in exact} & {row["key"] for row in lowered}
    assert [row["compute_dtype"] for row in lowered] == ["bfloat16", "bfloat16"]
    assert lowered[1]["weight_error"] == exact[1]["weight_error"] and lowered[1]["nll"] != exact[1]["nll"]
    assert request_of(lowered[1])["compute_dtype"] == "bfloat16"

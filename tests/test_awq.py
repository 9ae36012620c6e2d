"""qjax.transforms.awq: the search of scales against the float64 oracle, what a scale must not change, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.formats import parse_format
from qjax.linear import Linear, apply_linear, dequantize
from qjax.maps import Divide, Scale
from qjax.rounding.nearest import rtn
from qjax.transforms import awq as transform
from qjax.transforms.awq import awq
from tests.oracles import awq as oracle
from tests.oracles.gptq import layer_error

IN, TOKENS = 32, 64


@functools.cache
def case(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Two weights that share an input, and tokens with a few large channels."""
    generator = np.random.default_rng(seed)
    weights = [(generator.standard_t(5, (IN, out)) * 0.1).astype(np.float32) for out in (6, 4)]
    size = np.exp(generator.standard_normal(IN))
    return weights, (generator.standard_normal((TOKENS, IN)) * size).astype(np.float32)


def statistics(x: np.ndarray) -> dict[str, jax.Array]:
    return {
        "hessian": jnp.asarray(x.astype(np.float64).T @ x / len(x), jnp.float32),
        "abs_mean": jnp.asarray(np.mean(np.abs(x), 0)),
    }


def awq_scale(*args, **options) -> jax.Array:
    """The scale of the map that the search finds."""
    found = transform.awq_scale(*args, **options)
    assert isinstance(found, Divide)
    return found.scale


def assert_best(scale, candidates, tolerance=1e-3):
    """The scale is one of the candidates, and none is better but by rounding."""
    scale = np.asarray(scale, np.float64)
    distances = [np.max(np.abs(candidate.scale / scale - 1)) for candidate in candidates]
    chosen = candidates[int(np.argmin(distances))]
    assert min(distances) < 1e-4
    assert chosen.error <= min(candidate.error for candidate in candidates) * (1 + tolerance)
    return chosen


@pytest.mark.parametrize("name", ["int3-g8", "int4-g12", "int2-channel-sym", "nf4-g16"])
@pytest.mark.parametrize("scaling", ["reference", "duo", "both"])
def test_chooses_as_the_oracle_does(name, scaling):
    weights, x = case()
    fmt = parse_format(name)
    scale = awq_scale([jnp.asarray(w) for w in weights], fmt, **statistics(x), scaling=scaling)
    chosen = assert_best(scale, oracle.search(weights, x, fmt, scaling))
    assert chosen.kind != "one"  # there was something to gain
    assert scale.dtype == jnp.float32 and scale.shape == (IN,)


def test_fewer_ratios():
    weights, x = case(1)
    fmt = parse_format("int3-g8")
    scale = awq_scale([jnp.asarray(weights[0])], fmt, **statistics(x), scaling="reference", ratios=3)
    assert_best(scale, oracle.search(weights[:1], x, fmt, "reference", 3))


def test_module_loss_takes_the_least_of_what_the_module_says():
    """Called with the weights that each candidate stands for; whichever it likes best wins."""
    weights, x = case()
    fmt = parse_format("int3-g8")
    candidates = oracle.search(weights, x, fmt, "reference", 5)
    seen = []

    def module(replaced):
        seen.append([np.asarray(w) for w in replaced])
        return jnp.float32(abs(len(seen) - 4))  # the fourth

    given = {"abs_mean": statistics(x)["abs_mean"], "scaling": "reference", "ratios": 5}
    scale = awq_scale([jnp.asarray(w) for w in weights], fmt, **given, loss="module", module=module)
    assert len(seen) == 6
    np.testing.assert_allclose(scale, candidates[3].scale, rtol=1e-4)
    for got, weight in zip(seen[3], weights, strict=True):
        assert np.mean(np.isclose(got, oracle.rounded(weight, candidates[3].scale, fmt), atol=1e-5)) > 0.98

    def output(replaced):  # the outputs' own error is loss=hessian
        return sum(jnp.sum(jnp.square(x @ (new - old))) for new, old in zip(replaced, weights, strict=True))

    by_module = awq_scale([jnp.asarray(w) for w in weights], fmt, **given, loss="module", module=output)
    by_hessian = awq_scale([jnp.asarray(w) for w in weights], fmt, **given, hessian=statistics(x)["hessian"])
    np.testing.assert_array_equal(by_module, by_hessian)


@pytest.mark.parametrize("loss", ["hessian", "module"])
def test_a_scale_is_kept_only_where_the_rounding_that_follows_gains(loss):
    """A rounding that is exact without a scale wants none; one that rounds as the search did keeps what was found."""
    weights, x = case()
    known, fmt = statistics(x), parse_format("int3-g8")
    weights = [jnp.asarray(weight) for weight in weights]

    def module(replaced):
        return sum(jnp.sum(jnp.square(x @ (new - old))) for new, old in zip(replaced, weights, strict=True))

    def scale_of(divide):
        return jnp.ones(IN) if divide is None else divide.scale

    def exact_without(divide):
        scale = scale_of(divide)
        return [weight + 0.01 * jnp.abs(jnp.log(scale))[:, None] for weight in weights]

    def as_searched(divide):
        scale = scale_of(divide)
        return [dequantize(rtn(weight * scale[:, None], fmt)[0]) / scale[:, None] for weight in weights]

    find = functools.partial(awq_scale, weights, fmt, **known, loss=loss, module=module, ratios=5)
    found = find()
    assert np.ptp(found) > 0
    np.testing.assert_array_equal(find(rounded=exact_without), 1)
    np.testing.assert_array_equal(find(rounded=exact_without, guard=False), found)
    np.testing.assert_array_equal(find(rounded=as_searched), found)


def test_equal_channels_need_no_scale():
    """Of equal errors the first candidate wins, which is 1."""
    weights, _ = case()
    x = np.eye(IN, dtype=np.float32)
    scale = awq_scale([jnp.asarray(weights[0])], "int3-g8", **statistics(x), scaling="reference")
    np.testing.assert_array_equal(scale, 1)


def test_channels_that_are_never_used():
    """A mean of 0: a finite scale, that a float16 holds, and a finite result."""
    weights, x = case()
    x = x.copy()
    x[:, [2, 9]] = 0
    scale = awq_scale([jnp.asarray(w) for w in weights], "int3-g8", **statistics(x))
    assert np.all(np.isfinite(scale)) and np.min(scale) >= 1e-4 and np.max(scale) <= 1e4
    q, info = awq(jnp.asarray(weights[0]), "int3-g8", **statistics(x))
    assert np.all(np.isfinite(dequantize(q))) and np.isfinite(info.proxy_loss)
    nothing, info = awq(jnp.asarray(weights[0]), "int3-g8", **statistics(np.zeros_like(x)))
    assert np.all(np.isfinite(dequantize(nothing)))
    assert float(info.proxy_loss) == 0


@pytest.mark.parametrize("clip", ["none", "mse", "hessian"])
def test_one_weight(clip):
    """A Linear whose scale is stored exactly, better than nearest rounding with the same clip, and Info says by how much."""
    weights, x = case()
    weight, known = jnp.asarray(weights[0]), statistics(x)
    q, info = awq(weight, "int3-g8", **known, clip=clip)
    assert isinstance(q, Linear) and isinstance(q.inputs[0], Scale) and q.inputs[0].scale.dtype == jnp.float16
    error = layer_error(np.asarray(dequantize(q)), weights[0], np.asarray(known["hessian"]))
    assert float(info.proxy_loss) == pytest.approx(error, rel=1e-3)
    whole = layer_error(np.zeros_like(weights[0]), weights[0], np.asarray(known["hessian"]))
    assert float(info.output_error) == pytest.approx(error / whole, rel=1e-3)
    plain, _ = rtn(weight, "int3-g8", hessian=known["hessian"], clip=clip)
    assert error < layer_error(np.asarray(dequantize(plain)), weights[0], np.asarray(known["hessian"]))
    # The codes are those of the weight times the stored scale.
    scale = q.inputs[0].scale.astype(jnp.float32)
    scaled = weight / scale[:, None]
    hessian = known["hessian"] * scale[:, None] * scale
    again, _ = rtn(scaled, "int3-g8", hessian=hessian, clip=clip)
    assert np.mean(np.asarray(again.codes) == np.asarray(q.weight.codes)) > 0.98
    np.testing.assert_allclose(apply_linear(jnp.asarray(x), q), x @ np.asarray(dequantize(q)), atol=1e-4)
    assert q.bits_per_weight == pytest.approx(8 * (q.weight.nbytes + 2 * IN) / weights[0].size)


def test_works_under_jit():
    weights, x = case()
    known = statistics(x)
    plain, _ = awq(jnp.asarray(weights[0]), "int4-g8", **known)
    compiled, _ = jax.jit(lambda w, h, m: awq(w, "int4-g8", hessian=h, abs_mean=m))(
        jnp.asarray(weights[0]), known["hessian"], known["abs_mean"]
    )
    assert np.mean(np.asarray(plain.weight.codes) == np.asarray(compiled.weight.codes)) > 0.98


@pytest.mark.parametrize("broken", ["hessian", "abs_mean", "weight"])
def test_what_is_not_finite_does_not_give_a_scale_of_one(broken):
    weights, x = case()
    given = {"weight": jnp.asarray(weights[0]), **statistics(x)}
    given[broken] = given[broken].at[0].set(jnp.nan)
    _, info = awq(fmt="int4-g8", **given)
    assert not np.isfinite(float(info.weight_error)) and not np.isfinite(float(info.proxy_loss))
    weight = given.pop("weight")
    assert not np.any(np.isfinite(awq_scale([weight], "int4-g8", **given)))
    module = lambda new: jnp.nan * jnp.sum(new[0])  # noqa: E731
    assert not np.any(np.isfinite(awq_scale([weight], "int4-g8", loss="module", module=module, **given)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss": "output"}, "loss is one of hessian, module.*loss='output'"),
        ({"scaling": "trio"}, "scaling one of reference, duo, both.*'trio'"),
        ({"ratios": 0}, "ratios=0"),
        ({"hessian": None}, "loss='hessian' needs hessian="),
        ({"loss": "module"}, "loss='module' needs module="),
    ],
)
def test_bad_options_are_named(options, named):
    weights, x = case()
    with pytest.raises(QjaxError, match=named):
        awq_scale([jnp.asarray(weights[0])], "int4-g8", **(statistics(x) | options))


def test_statistics_of_another_shape_are_refused():
    weights, x = case()
    known = statistics(x)
    with pytest.raises(QjaxError, match=r"the Hessian has shape \(8, 8\)"):
        awq(jnp.asarray(weights[0]), "int4-g8", **(known | {"hessian": jnp.eye(8)}))
    for wrong in (jnp.ones(1), jnp.ones(8)):
        with pytest.raises(QjaxError, match=r"abs_mean"):
            awq(jnp.asarray(weights[0]), "int4-g8", **(known | {"abs_mean": wrong}))


@pytest.mark.parametrize("name", ["int4-g8", "int2-channel-sym", "nf4-g16", "int8-g8"])
def test_a_first_look_leaves_out_none_that_is_best(name, monkeypatch):
    """The errors that are told are those without the look, to the bit, and the least is among them; the others are worse."""
    weights, x = case()
    fmt, known = parse_format(name), statistics(x)
    weights = tuple(map(jnp.asarray, weights))
    candidates = transform._candidates(weights, known["abs_mean"], fmt, "both", 20)
    errors = functools.partial(transform._hessian_errors.__wrapped__, known["hessian"], weights, fmt=fmt)
    plain = np.asarray(errors(candidates))
    monkeypatch.setattr(transform, "WORTH_A_LOOK", 1)
    looked = np.asarray(errors(candidates))
    told = np.isfinite(looked)
    np.testing.assert_array_equal(looked[told], plain[told])
    assert told[0] and np.sum(~told) > 0 and np.argmin(looked) == np.argmin(plain)
    assert np.min(plain[~told]) > np.min(plain) * (1 + transform.MARGIN / 2)
    broken = np.asarray(errors(candidates.at[3].set(jnp.nan)))
    np.testing.assert_array_equal(np.isnan(broken), np.arange(len(candidates)) == 3)


@pytest.mark.parametrize("name", ["int4-g128", "int2-g64"])
def test_wide_layers_get_the_scale_that_they_would_without_the_look(name, monkeypatch):
    """Compiled, as users have it."""
    generator = np.random.default_rng(1)
    weights = [jnp.asarray(generator.standard_t(5, (576, out)), jnp.float32) for out in (16, 8)]
    known = statistics(generator.standard_normal((700, 576)).astype(np.float32) * np.exp(generator.standard_normal(576)))
    looked = awq_scale(weights, name, **known)
    monkeypatch.setattr(transform, "WORTH_A_LOOK", 10**6)
    transform._hessian_errors.clear_cache()
    np.testing.assert_array_equal(awq_scale(weights, name, **known), looked)
    transform._hessian_errors.clear_cache()
    assert np.ptp(looked) > 0


def test_where_errors_cancel_or_are_none_all_are_told(monkeypatch):
    """A quadratic form that is not positive tells nothing in bfloat16; errors of 0 are not far from the least."""
    monkeypatch.setattr(transform, "WORTH_A_LOOK", 1)
    errors, fmt = transform._hessian_errors.__wrapped__, parse_format("int4-g8")
    found = errors(jnp.eye(IN), (jnp.zeros((IN, 4)),), jnp.ones((3, IN)), fmt)
    np.testing.assert_array_equal(found, np.zeros(3))
    weights, _ = case()
    scales = jnp.asarray(np.exp(np.random.default_rng(0).standard_normal((5, IN))), jnp.float32)
    assert np.isfinite(errors(-jnp.eye(IN), tuple(map(jnp.asarray, weights)), scales, fmt)).all()

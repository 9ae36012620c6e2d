"""Pretraining: the schedule, the step, resumption bit for bit, and what the training text keeps out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.models.config import DecoderConfig
from qjax.models.walk import Decoder
from qjax.train import pretrain, text

MODEL = DecoderConfig(
    family="llama",
    vocabulary_size=16,
    hidden_size=16,
    mlp_size=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    context=8,
    tied=True,
)
CONFIG = pretrain.PretrainConfig(MODEL, steps=30, batch=4, peak_learning_rate=3e-2)


@pytest.fixture(scope="module")
def tokens():
    """A stream whose next token is decided by the one before."""
    return np.tile(np.random.default_rng(0).permutation(16), 40).astype(np.uint16)


@pytest.fixture(scope="module")
def step():
    return pretrain.make_step(CONFIG)


@pytest.fixture(scope="module")
def initial():
    """The initial state on the host: a step donates what it is given."""
    return jax.device_get(pretrain.init_state(CONFIG))


def run(step, state, tokens, until):
    losses = []
    for index in range(int(state.step), until):
        state, value = step(state, pretrain.batch_at(tokens, CONFIG, index))
        losses.append(float(value))
    return state, losses


def test_loss_starts_at_the_uniform_value_and_falls(step, initial, tokens):
    state, losses = run(step, initial, tokens, CONFIG.steps)
    assert abs(losses[0] - math.log(16)) < 0.3
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == CONFIG.steps


def test_loss_is_the_mean_negative_log_likelihood(initial, tokens):
    params, batch = initial.params, pretrain.batch_at(tokens, CONFIG, 0)
    logits = np.asarray(Decoder(MODEL).apply({"params": params}, batch[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean(np.take_along_axis(log_p, batch[:, 1:, None], -1))
    assert float(pretrain.loss(MODEL, params, batch)) == pytest.approx(expected, rel=1e-5)


def test_micro_batches_change_nothing_but_rounding(step, initial, tokens):
    whole = pretrain.make_step(dataclasses.replace(CONFIG, micro_batch=4))
    batch = pretrain.batch_at(tokens, CONFIG, 0)
    (a, loss_a), (b, loss_b) = step(initial, batch), whole(initial, batch)
    assert float(loss_a) == pytest.approx(float(loss_b), rel=1e-5)
    # The second moment is linear in the squared gradient; parameters after one Adam step know only its sign.
    moments = [jax.tree.leaves(state.optimizer[1][0].nu) for state in (a, b)]
    for first, second in zip(*moments, strict=True):
        np.testing.assert_allclose(first, second, rtol=2e-4, atol=1e-12)


def test_resumed_run_is_bit_equal(step, initial, tokens, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    straight, losses = run(step, initial, tokens, 12)
    half, _ = run(step, initial, tokens, 7)
    with pretrain.checkpoints(tmp_path / "run") as manager:
        assert int(pretrain.restore_latest(manager, CONFIG).step) == 0
        pretrain.save(manager, half)
    with pretrain.checkpoints(tmp_path / "run") as manager:
        restored = pretrain.restore_latest(manager, CONFIG)
    assert int(restored.step) == 7
    resumed, tail = run(step, restored, tokens, 12)
    assert tail == losses[7:]
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_are_windows_decided_by_seed_and_step(tokens):
    batch = pretrain.batch_at(tokens, CONFIG, 3)
    assert batch.shape == (4, 9) and batch.dtype == np.int32
    np.testing.assert_array_equal(batch, pretrain.batch_at(tokens, CONFIG, 3))
    assert (batch != pretrain.batch_at(tokens, CONFIG, 4)).any()
    assert (batch != pretrain.batch_at(tokens, dataclasses.replace(CONFIG, seed=1), 3)).any()
    stream = np.arange(9, dtype=np.uint16)  # one window fits
    np.testing.assert_array_equal(pretrain.batch_at(stream, CONFIG, 0), np.tile(stream, (4, 1)))


def test_learning_rate_rises_then_falls_to_nearly_zero():
    config = dataclasses.replace(CONFIG, steps=100, warmup_fraction=0.1)
    rates = np.array([pretrain.learning_rate(config, step) for step in range(100)]) / config.peak_learning_rate
    assert rates[0] == pytest.approx(0.1) and rates[9:11] == pytest.approx(1.0)
    assert (np.diff(rates[10:]) < 0).all() and rates[-1] == pytest.approx(1 / 90)


def test_weight_decay_spares_norms():
    config = dataclasses.replace(CONFIG, weight_decay=1.0)
    params = {"scale": jnp.ones(2), "kernel": jnp.ones((2, 2))}
    optimizer = pretrain.make_optimizer(config)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert (updates["scale"] == 0).all()
    assert (updates["kernel"] < 0).all()


def test_initial_kernels_that_write_to_the_residual_stream_are_small():
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, hidden_size=128, mlp_size=128))
    block = pretrain.init_state(wide).params["block_0"]["mlp"]
    assert np.std(block["down"]["kernel"]) / np.std(block["up"]["kernel"]) == pytest.approx(2**-0.5, rel=0.05)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch": 5}])
def test_bad_config_is_refused(bad):
    with pytest.raises(QjaxError, match="micro_batch"):
        dataclasses.replace(CONFIG, **bad)


def test_too_many_devices_and_too_little_text_are_refused():
    with pytest.raises(QjaxError, match="64 devices"):
        pretrain.make_step(CONFIG, 64)
    with pytest.raises(QjaxError, match="8 tokens"):
        pretrain.batch_at(np.zeros(8, np.uint16), CONFIG, 0)


def test_held_out_lines_are_dropped_wherever_they_are_quoted():
    line = "This very sentence is held out of training."
    kept = text.without_lines(f'x = 1\n    """{line}\n  # {line}\ny = 2', text.held_out_lines([f"short\n{line}"]))
    assert kept == "x = 1\ny = 2"
    assert text.without_lines("short\n", text.held_out_lines(["short"])) == "short\n"


def test_packages_are_capped_and_their_tests_left_out(tmp_path):
    def write(path, content):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)

    prose = "Some words of documentation, again and again. " * 8
    for i in range(9):
        write(f"big/m{i}.py", f'"""{prose}{i}"""\n' + "call_it(value)\n" * 60)
    write("big/tests/test_big.py", "assert something_that_holds\n" * 60)
    write("big/table.py", "1234567890, " * 60)
    write("big-1.0.dist-info/METADATA", f"Name: big\n\n{prose}")
    write("big-1.0.dist-info/LICENSE.txt", prose)
    found = list(text._packages(tmp_path, 4000))
    code = [d for d in found if not d.prose]
    assert {d.source for d in found} == {"big"} and len(code) == 3 and sum(len(d.text) for d in code) <= 4000
    assert not [d for d in found if "something_that_holds" in d.text or "1234567890" in d.text]
    assert [d for d in found if d.text == prose]

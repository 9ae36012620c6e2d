"""train/loop.py: windows, schedules, micro-batches, devices, checkpoints, and what stops a run."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.errors import QjaxError
from qjax.numbers import NotFiniteError
from qjax.train import loop
from qjax.train.log import ROWS, step_log, step_rows
from qjax.train.loop import TrainConfig
from tests.conftest import byte_tokenizer

CONFIG = TrainConfig(steps=9, batch=8, micro_batch=1, window=6, learning_rate=0.1)
TRAINED = {"table": jnp.zeros((16, 16)), "shift": jnp.zeros(16)}
FROZEN = {"scale": jnp.float32(2.0)}
CHILD = """
import jax, numpy as np
from tests.test_train_loop import CONFIG, FROZEN, TRAINED, loss, stream
from qjax.train.loop import train
told = []
one = train(loss, TRAINED, FROZEN, stream(), CONFIG, on_step=told.append)
many = train(loss, TRAINED, FROZEN, stream(), CONFIG, devices=8, on_step=told.append)
assert len(jax.devices()) == 8 and len(many["table"].sharding.device_set) == 8
for a, b in zip(told[:9], told[9:]):
    assert a.step == b.step and abs(a.loss - b.loss) < 1e-6 and abs(a.gradient_norm - b.gradient_norm) < 1e-6, (a, b)
for key in one:
    np.testing.assert_allclose(one[key], many[key], atol=2e-5)
"""


def loss(trained, frozen, tokens):
    """Of a table of what follows what."""
    logits = frozen["scale"] * (trained["table"][tokens[:, :-1]] + trained["shift"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def stream() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 16, 61).astype(np.int32)


def run(**options):
    told = []
    result = loop.train(loss, TRAINED, FROZEN, stream(), CONFIG, on_step=told.append, **options)
    return result, told


@pytest.fixture(scope="module")
def straight():
    return run()


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_pass_sees_every_window_once():
    config = TrainConfig(steps=1, batch=4, window=5, seed=3)
    tokens = np.arange(64, dtype=np.int32)  # 12 windows
    batches = [loop.batch_at(tokens, config, step) for step in range(6)]
    for first in (0, 3):
        rows = np.concatenate(batches[first : first + 3])
        assert sorted(rows[:, 0]) == list(range(0, 60, 5)) and (np.diff(rows, axis=1) == 1).all()
    assert not np.array_equal(batches[0], batches[3])
    np.testing.assert_array_equal(batches[2], loop.batch_at(tokens, config, 2))
    other = TrainConfig(steps=1, batch=4, window=5, seed=4)
    assert not np.array_equal(batches[0], loop.batch_at(tokens, other, 0))


def test_documents_are_packed_with_their_ends():
    tokens = loop.packed_tokens(byte_tokenizer(bos=True), ["ab", "c"])
    plain = byte_tokenizer().encode("abc")
    np.testing.assert_array_equal(tokens, [256, *plain[:2], 256, plain[2]])
    with pytest.raises(QjaxError, match="mine has no tokenizer"):
        loop.packed_tokens(None, ["a"], "mine")


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_learning_rate_rises_and_falls(schedule, middle):
    config = TrainConfig(steps=100, warmup=0.1, schedule=schedule, learning_rate=2.0)
    rates = np.array([loop.learning_rate(config, step) for step in range(100)]) / 2
    assert rates[0] == pytest.approx(0.1) and rates[9:11] == pytest.approx(1.0) and rates[55] == pytest.approx(middle)
    assert rates[99] == pytest.approx({"linear": 1 / 90, "cosine": 0.0, "constant": 1.0}[schedule], abs=1e-3)


def test_the_loss_falls_and_the_first_one_is_uniform(straight):
    _, told = straight
    assert [each.step for each in told] == list(range(1, 10))
    assert told[0].loss == pytest.approx(np.log(16), rel=1e-5) and told[-1].loss < 0.9 * told[0].loss
    assert told[-1].seconds_left == 0 and told[0].tokens_per_second > 0 and told[0].learning_rate == pytest.approx(0.1)


def test_micro_batches_and_clipping_are_those_of_the_whole_batch():
    """The second moment after a step is linear in the squared, clipped gradient."""
    batch, moments = jnp.asarray(loop.batch_at(stream(), CONFIG, 0)), []
    gradient = jax.grad(loss)(TRAINED, FROZEN, batch)
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in gradient.values())))
    for micro, clip in ((1, 1e9), (8, 1e9), (2, norm / 2)):
        config = TrainConfig(steps=9, batch=8, micro_batch=micro, window=6, clip_norm=clip)
        optimizer = loop.make_optimizer(config)
        step = loop.make_step(loss, config, optimizer)
        state, (value, told) = step(loop.init_state(jax.tree.map(jnp.array, TRAINED), optimizer), FROZEN, batch)
        assert float(told) == pytest.approx(norm, rel=1e-5) and float(value) == pytest.approx(np.log(16), rel=1e-5)
        moments.append(state.optimizer[1][0].nu["table"])
    expected = 0.001 * np.square(gradient["table"])
    for found, factor in zip(moments, (1, 1, 0.25), strict=True):
        np.testing.assert_allclose(found, factor * expected, rtol=1e-4, atol=1e-12)


def test_rates_of_single_leaves():
    config = TrainConfig(steps=2, warmup=0, schedule="constant", learning_rate=0.1)
    optimizer = loop.make_optimizer(config, {"shift": 0.01})
    ones = jax.tree.map(jnp.ones_like, TRAINED)
    updates, _ = optimizer.update(ones, optimizer.init(TRAINED), TRAINED)
    np.testing.assert_allclose(updates["table"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["shift"], -0.001, rtol=1e-5)


def test_a_killed_run_goes_on_bit_for_bit(straight, tmp_path):
    pytest.importorskip("orbax.checkpoint")

    def kill(told):
        if told.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(loss, TRAINED, FROZEN, stream(), CONFIG, folder=tmp_path / "run", save_every=2, on_step=kill)
    result, told = run(folder=tmp_path / "run", save_every=2)
    assert [each.step for each in told] == [7, 8, 9]
    assert [each.loss for each in told] == [each.loss for each in straight[1][6:]]
    assert_equal(result, straight[0])
    assert run(folder=tmp_path / "run")[1] == []  # all is done
    other = TrainConfig(steps=10, batch=8, window=6)
    with pytest.raises(QjaxError, match=r"another run \(config, base differ\)"):
        loop.train(loss, TRAINED, FROZEN, stream(), other, folder=tmp_path / "run", identity={"base": "b"})


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(tmp_path):
    pytest.importorskip("orbax.checkpoint")

    def breaks(trained, frozen, tokens):
        return loss(trained, frozen, tokens) + jnp.where(trained["shift"][0] < -0.05, jnp.nan, 0.0) + trained["shift"][0]

    config = TrainConfig(steps=9, batch=1, window=6, learning_rate=0.03, warmup=0)
    with pytest.raises(NotFiniteError, match=r"step 3 the loss is nan.*checkpoint is .*run/steps/1; lower") as stopped:
        loop.train(breaks, TRAINED, FROZEN, stream(), config, folder=tmp_path / "run", save_every=1)
    assert (tmp_path / "run" / "steps" / "1").is_dir(), stopped  # of the second one the loss is nan
    with pytest.raises(NotFiniteError, match="there is no good checkpoint"):
        loop.train(breaks, TRAINED, FROZEN, stream(), config)


def test_what_the_last_step_made_is_finite():
    config = TrainConfig(steps=1, batch=1, window=6, learning_rate=3e38, weight_decay=10.0)
    with pytest.raises(NotFiniteError, match="what step 1 made is not finite"):
        loop.train(loss, jax.tree.map(jnp.ones_like, TRAINED), FROZEN, stream(), config)


def test_eight_devices_do_what_one_does():
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(qjax.__file__).parents[1]), str(Path(__file__).parents[1])]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_what_is_refused():
    with pytest.raises(QjaxError, match="expected at least a window \\+ 1 = 7"):
        loop.train(loss, TRAINED, FROZEN, stream()[:6], CONFIG)
    with pytest.raises(QjaxError, match="64 devices"):
        loop.train(loss, TRAINED, FROZEN, stream(), CONFIG, devices=64)
    for bad in (
        {"steps": 0},
        {"batch": 3, "micro_batch": 2},
        {"learning_rate": 0.0},
        {"schedule": "stairs"},
        {"warmup": 1.0},
        {"seed": -1},
    ):
        with pytest.raises(QjaxError, match="expected sizes of at least 1"):
            TrainConfig(**({"steps": 1} | bad))


def test_checkpoints_that_cannot_be_read_are_one_error(tmp_path):
    """Arrays of other sizes, a checkpoint that lost them, and what orbax says of one."""
    state = loop.init_state({"a": jnp.arange(6.0)}, loop.make_optimizer(CONFIG))._replace(step=jnp.int32(3))
    with loop.checkpoints(tmp_path / "steps") as manager:
        loop.save(manager, state)
        np.testing.assert_array_equal(loop.restore_latest(manager, state).params["a"], np.arange(6.0))
        other = loop.init_state({"a": jnp.zeros(5)}, loop.make_optimizer(CONFIG))
        with pytest.raises(QjaxError, match=r"steps/3 .*; remove it: the one before it"):
            loop.restore_latest(manager, other)
    shutil.rmtree(tmp_path / "steps" / "3" / "default")
    with loop.checkpoints(tmp_path / "steps") as manager, pytest.raises(QjaxError, match=r"cannot read .*steps/3"):
        loop.restore_latest(manager, state)
    (told,) = (tmp_path / "steps" / "3").glob("_CHECKPOINT_METADATA")
    told.write_text('{"init_timestamp_nsecs": "a"}')
    with (
        pytest.raises(QjaxError, match=r"cannot read the checkpoints in .*steps .*remove them"),
        loop.checkpoints(told.parent.parent),
    ):
        pass


def test_what_orbax_says_when_it_closes_is_one_error(tmp_path, caplog, monkeypatch):
    """And nothing else: its threads log tracebacks, of which those of others are kept."""
    log = logging.getLogger("absl")
    told = pytest.raises(QjaxError, match=r"cannot write the checkpoints in .*free space")
    with told, loop.checkpoints(tmp_path / "steps") as manager:
        close = manager.close
        monkeypatch.setattr(manager, "close", lambda: close() or 1 / 0)
        for path in ("/site/orbax/checkpoint/a.py", "/site/mine/b.py"):
            log.handle(logging.LogRecord("absl", logging.ERROR, path, 1, path, None, None))
    assert [record.pathname for record in caplog.records] == ["/site/mine/b.py"]


def test_rows_of_a_killed_run(tmp_path):
    """Its unfinished last row goes, as do those of steps that are done again; other damage is named."""
    path, told = tmp_path / ROWS, loop.Told(1, 2.5, 0.1, 1e-4, 100.0, 9.0)
    log = step_log(path)
    for step in (1, 2, 3):
        log(told._replace(step=step))
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "lo')
    assert [row["step"] for row in step_rows(path)] == [1, 2, 3]
    step_log(path)(told._replace(step=3))
    assert path.read_text() == whole
    for line, said in (('{"step": 2, "lo', "line 1 is not a JSON object"), ('{"step": 2}', "line 1 has no number in loss")):
        path.write_text(line + "\n" + whole)
        with pytest.raises(QjaxError, match=said):
            step_rows(path)

"""The training loop: windows of a text, one jitted step, checkpoints, and what is told of every step.

    minimise over `trained`   mean over windows of loss(trained, frozen, window)

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), gradients clipped by their global norm. A batch is a function of
(seed, step) alone, and the state holds everything else: a run that was killed goes on from its last checkpoint bit for bit.
A step splits its batch over a mesh of devices and, within a device, over micro-batches whose gradients are added up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from qjax.errors import QjaxError
from qjax.files import write_atomically
from qjax.numbers import NotFiniteError
from qjax.qtensor import nbytes
from qjax.train.settings import TrainConfig
from qjax.untrusted import read_json, status

Loss = Callable[[PyTree, PyTree, Int[Array, "batch time_plus_1"]], Float[Array, ""]]
NO_SPACE = "choose a writable folder with free space, and run again"
IDENTITY = "run.json"  # beside the checkpoints: what run they are of


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Int[Array, ""]  # finished steps
    params: Any  # what is trained
    optimizer: optax.OptState


class Told(NamedTuple):
    """What is told of a finished step: its loss (nats) and gradient norm are of the parameters before it."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


# --- tokens --------------------------------------------------------------------------------------------------------------


def packed_tokens(tokenizer: Any, documents: Iterable[str], name: str = "the model") -> Int[np.ndarray, " length"]:
    """The documents' tokens one after the other, each with the beginning and end of text that the tokenizer knows, once.

    Raises QjaxError for a model without tokenizer.
    """
    if tokenizer is None:
        raise QjaxError(f"{name} has no tokenizer.json, which training on text needs")
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    parts = [np.zeros(0, np.int32)]
    for document in documents:
        ids = tokenizer.encode(document)
        parts += [start if ids[:1].tolist() != start else [], ids, end if ids[-1:].tolist() != end else []]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def batch_at(tokens: Int[np.ndarray, " length"], config: TrainConfig, step: int) -> Int[np.ndarray, "batch time_plus_1"]:
    """The windows of one step: those of the text side by side, in an order drawn anew for every pass over them.

    A window's last token, which is only predicted, is the next one's first. Raises QjaxError for a text shorter than a window.
    """
    count = (len(tokens) - 1) // config.window
    if count < 1:
        raise QjaxError(
            f"training text: got {len(tokens)} tokens, expected at least a window + 1 = {config.window + 1}; give more text "
            "or a shorter window"
        )
    places = np.arange(step * config.batch, (step + 1) * config.batch)
    passes = {number: np.random.default_rng([config.seed, number]).permutation(count) for number in set(places // count)}
    chosen = np.array([passes[place // count][place % count] for place in places])
    return tokens[chosen[:, None] * config.window + np.arange(config.window + 1)].astype(np.int32)


# --- the step ------------------------------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Linear warm-up, then the schedule, which would reach zero one step after the last."""
    warmup = round(config.warmup * config.steps)
    rising = (step + 1) / max(1, warmup)
    share = jnp.clip((step - warmup) / max(1, config.steps - warmup), 0.0, 1.0)
    falling = {"linear": 1 - share, "cosine": (1 + jnp.cos(jnp.pi * share)) / 2, "constant": 1.0}[config.schedule]
    return config.learning_rate * jnp.minimum(1.0, jnp.minimum(rising, falling) if warmup else falling)


def make_optimizer(config: TrainConfig, rates: Mapping[str, float] | None = None) -> optax.GradientTransformation:
    """Clipping, then AdamW. rates: of a trained dictionary, by the end of a key, what its learning rate is multiplied with."""

    def rate_of(key: str) -> float:
        return next((rate for end, rate in (rates or {}).items() if key.endswith(end)), 1.0)

    scaled = optax.stateless(lambda updates, _: {key: update * rate_of(key) for key, update in updates.items()})
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(lambda count: learning_rate(config, count), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
        scaled if rates else optax.identity(),
    )


def mesh_of(devices: int, batch: int, micro_batch: int) -> Mesh:
    """The first devices as a mesh with one axis, "data". Raises QjaxError when they do not exist or do not divide the batch
    into whole micro-batches.
    """
    if devices > jax.device_count() or batch % (devices * micro_batch):
        raise QjaxError(
            f"training on {devices} devices: got {jax.device_count()} devices, batch {batch} and micro-batch {micro_batch}; "
            "expected a batch that devices * micro_batch divides"
        )
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))


def gradient_over(mesh: Mesh, loss: Loss, micro_batch: int) -> Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]:
    """(trained, frozen, tokens) -> (mean loss, its gradient by `trained`), the batch split over the mesh and micro-batches."""

    def device_gradient(trained: Any, frozen: Any, tokens: Array) -> tuple[Array, Any]:
        trained = jax.lax.pcast(trained, "data", to="varying")
        micro = tokens.reshape(-1, micro_batch, tokens.shape[-1])

        def accumulate(total: Any, part: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trained, frozen, part)), None

        zero = jax.lax.pcast(jnp.zeros(()), "data", to="varying"), jax.tree.map(jnp.zeros_like, trained)
        total, _ = jax.lax.scan(accumulate, zero, micro)
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf / len(micro), "data"), total)

    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(device_gradient, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(), PartitionSpec()))


def init_state(trained: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))


def make_step(
    loss: Loss, config: TrainConfig, optimizer: optax.GradientTransformation, devices: int = 1
) -> Callable[[TrainState, PyTree, Array], tuple[TrainState, tuple[Array, Array]]]:
    """The jitted step (state, frozen, tokens) -> (state, (loss, norm of the gradient)); the state's buffers are donated."""
    mesh = mesh_of(devices, config.batch, config.micro_batch)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    gradient = gradient_over(mesh, loss, config.micro_batch)

    def step(state: TrainState, frozen: PyTree, tokens: Array) -> tuple[TrainState, tuple[Array, Array]]:
        value, gradients = gradient(state.params, frozen, tokens)
        updates, after = optimizer.update(gradients, state.optimizer, state.params)
        trained = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, trained, after), (value, _norm(gradients))

    return jax.jit(step, donate_argnums=0, in_shardings=(whole, whole, split), out_shardings=whole)


def _norm(tree: PyTree) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@contextmanager
def checkpoints(folder: Path, *, keep: int = 2) -> Iterator[Any]:
    """An orbax manager that keeps the last `keep` checkpoints of `folder`; for `save` and `restore_latest`.

    Raises QjaxError where orbax is not installed, and where what it wrote of them is broken.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise QjaxError("checkpoints of a training need orbax-checkpoint; install qjax[train]") from error
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    log = logging.getLogger("absl")
    log.addFilter(_is_not_of_orbax)
    try:
        with _told_by_orbax(f"cannot read the checkpoints in {folder}", "remove them to begin anew"):
            manager = ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=ocp.StandardCheckpointHandler())
        try:
            yield manager
        finally:  # an error of its threads may come here once more
            with _told_by_orbax(f"cannot write the checkpoints in {folder}", NO_SPACE):
                manager.close()
    finally:
        log.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """What orbax's threads log of an error, pages of tracebacks, comes on top of the error itself."""
    return "orbax" not in Path(record.pathname).parts


def save(manager: Any, state: TrainState) -> None:
    """Write the state under its step. Raises QjaxError where it cannot be written."""
    import orbax.checkpoint as ocp

    with _told_by_orbax(f"cannot write the checkpoint {manager.directory / str(int(state.step))}", NO_SPACE):
        manager.save(int(state.step), args=ocp.args.StandardSave(_numbered(state)))
        manager.wait_until_finished()


def restore_latest(manager: Any, fresh: TrainState) -> TrainState:
    """The latest state, bit for bit, or the fresh one where there is no checkpoint. Raises QjaxError for one that is broken, or
    of other arrays.
    """
    import orbax.checkpoint as ocp

    if (latest := manager.latest_step()) is None:
        return fresh
    wanted = _numbered(fresh)
    with _told_by_orbax(f"cannot read {manager.directory / str(latest)}", "remove it: the one before it, if any, is taken"):
        held = {number: (each.shape, each.dtype) for number, each in dict(manager.item_metadata(latest)).items()}
        if held != {number: (leaf.shape, leaf.dtype) for number, leaf in wanted.items()}:
            raise ValueError("arrays of other sizes")
        restored = manager.restore(latest, args=ocp.args.StandardRestore(wanted))
        # Restored arrays are committed to one device; by way of the host they go where the step wants them.
        leaves = [jnp.asarray(np.asarray(restored[number])) for number in wanted]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


@contextmanager
def _told_by_orbax(what: str, advice: str) -> Iterator[None]:
    """Whatever orbax, and what it stands on, raise within, as one QjaxError: their exceptions are of every kind."""
    try:
        yield
    except Exception as error:
        raise QjaxError(f"{what} ({type(error).__name__}: {error}); {advice}") from error


def _numbered(state: TrainState) -> dict[str, Array]:
    """The state's arrays by number: files hold no classes of ours or of optax."""
    return {f"{number:06}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def claim(folder: Path, identity: Mapping[str, object]) -> None:
    """Writes what run a folder's checkpoints are of. Raises QjaxError, which names what differs, where they are of another."""
    identity = json.loads(json.dumps(identity))
    if status(folder / IDENTITY):
        before = read_json(folder / IDENTITY)
        differs = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
        if differs:
            raise QjaxError(
                f"{folder} holds checkpoints of another run ({', '.join(differs)} differ); name another folder, or remove it"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / IDENTITY, json.dumps(identity, indent=1) + "\n")


def tokens_fingerprint(tokens: Int[np.ndarray, " length"]) -> str:
    """First 16 hex digits of the SHA-256 of a text's tokens."""
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:16]


class Bytes(NamedTuple):
    """What a run holds between steps, and the gradient that a step adds; activations come on top."""

    frozen: int
    trained: int
    gradient: int
    optimizer: int


def bytes_of(trained: PyTree, frozen: PyTree, config: TrainConfig) -> Bytes:
    """Exact bytes of a run's arrays; of AdamW the optimizer's are twice the trained ones, and two counts."""
    optimizer = jax.eval_shape(make_optimizer(config).init, trained)
    size = nbytes(trained)
    return Bytes(nbytes(frozen), size, size, nbytes(optimizer))


# --- the run -------------------------------------------------------------------------------------------------------------


def train(
    loss: Loss,
    trained: PyTree,
    frozen: PyTree,
    tokens: Int[np.ndarray, " length"],
    config: TrainConfig,
    *,
    rates: Mapping[str, float] | None = None,
    devices: int = 1,
    folder: Path | None = None,
    save_every: int = 100,
    identity: Mapping[str, object] | None = None,
    on_step: Callable[[Told], None] = lambda told: None,
) -> PyTree:
    """What is trained after all steps.

    folder: of checkpoints, from the last of which the same call goes on. identity: what else than the configuration and the
    tokens makes the run what it is. Raises NotFiniteError, which names the step and the last good checkpoint, where the loss,
    its gradient or what is trained is not finite, and QjaxError for checkpoints of another run and a text that is too short.
    """
    batch_at(tokens, config, 0)
    optimizer = make_optimizer(config, rates)
    step_of = make_step(loss, config, optimizer, devices)
    state = init_state(jax.tree.map(jnp.array, trained), optimizer)  # copies: the step uses up what it is given
    if folder is not None:
        told = {"config": dataclasses.asdict(config), "tokens": tokens_fingerprint(tokens), **(identity or {})}
        claim(folder, told)
    with nullcontext() if folder is None else checkpoints(folder / "steps") as manager:
        state = state if manager is None else restore_latest(manager, state)
        frozen = jax.device_put(frozen, NamedSharding(mesh_of(devices, config.batch, config.micro_batch), PartitionSpec()))
        first, started = int(state.step), time.perf_counter()
        for step in range(first, config.steps):
            state, figures = step_of(state, frozen, batch_at(tokens, config, step))
            value, norm = map(float, figures)
            due = (step + 1) % save_every == 0 or step + 1 == config.steps
            if not (math.isfinite(value) and math.isfinite(norm) and (not due or _all_finite(state.params))):
                raise _not_finite(step, value, norm, folder, manager)
            seconds = (time.perf_counter() - started) / max(1, step - first)
            started = time.perf_counter() if step == first else started  # the first step compiles
            left, rate = seconds * (config.steps - step - 1), float(learning_rate(config, step))
            on_step(Told(step + 1, value, norm, rate, config.tokens_per_step / seconds, left))
            if manager is not None and due:
                save(manager, state)
    return state.params


def _all_finite(tree: PyTree) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def _not_finite(step: int, value: float, norm: float, folder: Path | None, manager: Any) -> NotFiniteError:
    # A checkpoint of `step` finished steps holds the very numbers that this loss is of: the one before it is good.
    before = [] if manager is None else [saved for saved in manager.all_steps() if saved < step]
    good = f"the last good checkpoint is {folder / 'steps' / str(max(before))}" if before else "there is no good checkpoint"
    remedy = "lower the learning rate" + ("" if folder is None else f", for which {folder} is to be removed")
    if math.isfinite(value) and math.isfinite(norm):
        return NotFiniteError(f"training: what step {step + 1} made is not finite; {good}; {remedy}")
    return NotFiniteError(
        f"training: at step {step + 1} the loss is {value}, the norm of its gradient {norm}; {good}; {remedy}, "
        "or look for broken weights"
    )

"""Learned rounding and learned steps, which need a block, its inputs, its targets and gradients: AutoRound's and LSQ's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import grid
from qjax.models import walk
from qjax.qtensor import from_codes, unpack_codes, unpack_parameters
from tests.extension.common import sweep, tiny_model

pytestmark = pytest.mark.usefixtures("registries")


def block_loss(block, weights):
    """Mean squared error of the block's output over all batches."""
    pairs = zip(block.inputs, block.targets, strict=True)
    return sum(jnp.mean(jnp.square(block.apply(weights, *args) - target)) for args, target in pairs) / len(block.inputs)


def parts(q):
    scale, zero = unpack_parameters(q)
    return scale[:, None], None if zero is None else zero[:, None]


def fake(weight, q, scale, offset=0.0):
    """The weight as the grid of q with these scales would have it, straight-through."""
    groups = grid.to_groups(weight, q.format)
    return grid.from_groups(grid.fake_quantize(groups, scale, parts(q)[1], q.format, offset=offset), q.format, *weight.shape)


def signround(block, start, *, steps: int = 8):
    """Cheng et al. 2023 (arXiv 2309.05516): offsets of the rounding by signed gradients; the best of all steps is kept."""

    @jax.jit
    def step(offsets, rate):
        def loss(offsets):
            weights = {
                path: fake(site.weight, start[path], parts(start[path])[0], offsets[path]) for path, site in block.sites.items()
            }
            return block_loss(block, weights)

        value, slope = jax.value_and_grad(loss)(offsets)
        return value, {path: jnp.clip(v - rate * jnp.sign(slope[path]), -0.5, 0.5) for path, v in offsets.items()}

    offsets = {path: jnp.zeros_like(grid.to_groups(site.weight, site.format)) for path, site in block.sites.items()}
    losses, best = [], offsets
    for number in range(steps):
        value, following = step(offsets, (1 - number / steps) / steps)
        losses.append(value)
        best = offsets if value <= min(losses) else best
        offsets = following

    def codes(path):
        q, weight = start[path], block.sites[path].weight
        scale, zero = parts(q)
        found = grid.encode(grid.to_groups(weight, q.format) + best[path] * scale, scale, zero, q.format)
        return grid.from_groups(found, q.format, *weight.shape)

    result = {path: with_codes(q, codes(path)) for path, q in start.items()}
    return result, qjax.BlockInfo(losses[0], block_loss(block, result))


def learned_steps(block, start, *, steps: int = 20, rate: float = 1e-3):
    """Esser et al. 2020 (arXiv 1902.08153): the scales by gradient descent, codes nearest."""
    scales = {path: parts(q)[0] for path, q in start.items()}
    optimizer = optax.adam(rate)
    state = optimizer.init(scales)

    @jax.jit
    def loss(scales):
        return block_loss(block, {path: fake(site.weight, start[path], scales[path]) for path, site in block.sites.items()})

    first = loss(scales)
    for _ in range(steps):
        updates, state = optimizer.update(jax.grad(loss)(scales), state)
        scales = optax.apply_updates(scales, updates)

    def rounded(path, q):
        weight = grid.to_groups(block.sites[path].weight, q.format)
        zero = unpack_parameters(q)[1]
        stored = grid.store_scales(scales[path][:, 0], q.format)
        scale = grid.load_scales(stored, q.format, scales[path][:, 0].shape)
        codes = grid.encode(weight, scale[:, None], None if zero is None else zero[:, None], q.format)
        found = grid.Parameters(scale, scale, zero, stored)
        return from_codes(grid.from_groups(codes, q.format, *q.shape), found, q.format)

    result = {path: rounded(path, q) for path, q in start.items()}
    after = block_loss(block, result)
    return (result, qjax.BlockInfo(first, after)) if after < first else (dict(start), qjax.BlockInfo(first, first))


def with_codes(q, codes):
    scale, zero = unpack_parameters(q)
    return from_codes(codes, grid.Parameters(scale, scale, zero, q.scales), q.format)


@pytest.mark.parametrize(
    ("refiner", "order"), [pytest.param(signround, "qep", marks=pytest.mark.slow), (learned_steps, "parallel")]
)
def test_a_block_refiner(tmp_path, refiner, order):
    """It lowers the error of every block's output, and the model is another one."""
    qjax.register(refiner, kind="block refiner")
    plain, refined = f"rtn(clip=hessian):int2-g16@{order}", f"rtn(clip=hessian)+{refiner.__name__}:int2-g16@{order}"
    rows = sweep(tmp_path, plain, refined)
    assert rows[refined]["nll"] != rows[plain]["nll"] and rows[refined]["refining"] == [refiner.__name__]
    layers = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text().splitlines()]
    told = [row for row in layers if row["recipe"] == rows[refined]["recipe"]]
    assert len(told) == 14 and all(row["block_loss_after"] <= row["block_loss_before"] for row in told)
    assert any(row["block_loss_after"] < row["block_loss_before"] for row in told)
    assert all(row.get("block_loss_after") is None for row in layers if row["recipe"] == rows[plain]["recipe"])


def test_targets_are_the_outputs_of_the_unquantized_model():
    """Whatever became of the blocks before, which are what the inputs come from."""
    seen, model, tokens = [], tiny_model(), np.random.default_rng(0).integers(0, 256, (2, 32)).astype(np.int32)

    def watch(block, start):
        seen.append(block)
        return dict(start), qjax.BlockInfo(jnp.float32(0), jnp.float32(0))

    qjax.register(watch, kind="block refiner")
    qjax.quantize(model, "rtn+watch:int2-g16@block", calibration=tokens, rules=["block_0/attention|block_1/attention=none"])
    embed, *blocks = walk.body(model.config)
    x = walk.run(embed, model.params, jnp.asarray(tokens))
    moved = []
    for part, block in zip(blocks, seen, strict=True):
        moved.append(float(jnp.max(jnp.abs(block.inputs[0][0] - x))))
        x = walk.run(part, model.params, x)
        np.testing.assert_allclose(block.targets[0], x, atol=1e-4)
    assert moved[0] == 0 and moved[1] > 0.1


def test_codes_survive_with_codes():
    q, _ = qjax.rtn(jax.random.normal(jax.random.key(0), (32, 8)), "int3-g16")
    again = with_codes(q, unpack_codes(q))
    for name in ("codes", "scales", "zeros"):
        assert np.array_equal(getattr(q, name), getattr(again, name)), name

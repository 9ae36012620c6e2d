"""A sweep of any function: its rows are those of its losses by hand, kept, and shown as a decoder's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.report.draws import merge_draws
from qjax.sweep.request import request_of
from tests.traced_models import normal

pytestmark = pytest.mark.filterwarnings("ignore:fewer calibration tokens")
PARAMS = {"up": normal(1, 8, 8), "head": normal(2, 8, 5)}
BATCHES = [(normal(3, 4, 6, 8), jnp.arange(24).reshape(4, 6) % 5), (normal(4, 2, 3, 8), jnp.arange(6).reshape(2, 3) % 5)]
CALIBRATION = [(normal(5, 8, 6, 8), jnp.zeros((8, 6), int))]
RECIPES = ("rtn:int3-g8", "gptq:int3-g8", "rtn:int8-channel-sym-max/int8-token")


def net(params, x, targets):
    return jnp.tanh(x @ params["up"]) @ params["head"]


def losses(logits, x, targets):
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked, targets > 0


def sweep(folder, recipes=RECIPES, **options):
    how = {"losses": losses, "batches": BATCHES, "calibration": CALIBRATION, "rules": ["head=none"]} | options
    return qjax.sweep_function(net, how.pop("params", PARAMS), how.pop("recipes", recipes), folder, **how)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    return folder, sweep(folder)


def in_program(number):
    """The losses, in a compiled program that closes over an array of the number."""
    by = jnp.full(6, number)
    scaled = jax.jit(lambda values: values * by[: values.shape[1]])
    return lambda *args: (scaled(losses(*args)[0]), losses(*args)[1])


def by_hand(params):
    rows = []
    for args in BATCHES:
        loss, kept = losses(qjax.apply_function(net, params, *args), *args)
        rows += [(float(jnp.sum(jnp.where(keep, each, 0))), int(keep.sum())) for each, keep in zip(loss, kept, strict=True)]
    return np.array(rows).T


def test_rows_are_the_losses_by_hand(measured):
    rows = measured[1]
    assert [row["recipe"] for row in rows] == ["none", *(f"{recipe}; head=none" for recipe in RECIPES)]
    for row, recipe in zip(rows, (None, *RECIPES), strict=True):
        data = CALIBRATION if recipe and "gptq" in recipe else BATCHES
        params, report = qjax.quantize_function(net, PARAMS, recipe, batches=data, rules=["head=none"] if recipe else [])
        totals, counts = by_hand(params)
        nll = totals.sum() / counts.sum()
        np.testing.assert_allclose(row["nll"], nll, rtol=1e-5)
        np.testing.assert_allclose(row["window_nll"], totals, rtol=1e-4)
        assert row["window_tokens"] == counts.tolist() and row["tokens"] == counts.sum()
        np.testing.assert_allclose(row["perplexity"], np.exp(nll), rtol=1e-5)
        np.testing.assert_allclose(row["nll_delta"], row["nll"] - rows[0]["nll"], atol=1e-9)
        assert row["bits_per_weight"] == report.bits_per_weight and row["size_bytes"] == report.size_bytes
        assert (row["calibration_windows"], row["order"]) == ((1, "qep") if data is CALIBRATION else (None, None))
    paired = qjax.paired_difference(*(np.array(row["window_nll"]) for row in rows[1::-1]), np.array(rows[0]["window_tokens"]))
    assert rows[1]["nll_delta_stderr"] == pytest.approx(paired.stderr, rel=1e-6)


def test_rows_are_kept_and_keys_are_of_all_that_was_asked(measured):
    folder, rows = measured
    assert sweep(folder) == rows and len((folder / "rows.jsonl").read_text().splitlines()) == len(rows)
    keys = {row["key"] for row in rows}
    others = {
        "params": {**PARAMS, "up": PARAMS["up"].at[0, 0].add(1e-3)},
        "batches": [*BATCHES[:1]],
        "losses": lambda *args: losses(*args)[0],
        "losses in a program": in_program(1.0),
        "losses in a program that closes over other numbers": in_program(2.0),
    }
    for name, value in others.items():
        found = {row["key"] for row in sweep(folder, RECIPES[:1], **{name.split()[0]: value})}
        assert not keys & found, name
        keys |= found


def test_tables_and_figures_are_made(measured, tmp_path):
    written = qjax.write_reports(tmp_path, measured[1])
    tables = [path.read_text() for path in written if path.suffix == ".md"]
    assert any(
        "Perplexity of function on batches (own-loss)" in each and "| rtn:int3-g8; head=none " in each for each in tables
    )


def test_draws_by_seed_are_rows_of_their_own_and_one_line(tmp_path):
    """Those of each seed alone, under the same keys; what reads no data has one row."""
    draws = {seed: [(normal(seed, 8, 6, 8), jnp.zeros((8, 6), int))] for seed in (5, 9)}
    rows = sweep(tmp_path / "both", calibration=draws)
    asked = [(row["recipe"].partition(";")[0], row["seed"], row["calibration_windows"]) for row in rows]
    drawn = [("gptq:int3-g8", seed, 1) for seed in draws]
    assert asked == [("none", 5, None), (RECIPES[0], 5, None), drawn[0], (RECIPES[2], 5, None), drawn[1]]
    alone = sweep(tmp_path / "alone", RECIPES[1:2], calibration={9: draws[9]})[1]
    assert all(rows[4][name] == alone[name] for name in ("key", "window_nll", "calibration_fingerprint"))
    given = sweep(tmp_path / "given", RECIPES[1:2], calibration=draws[9])[1]
    assert given["window_nll"] == rows[4]["window_nll"] != rows[2]["window_nll"] and given["key"] != alone["key"]
    (merged,) = [row for row in merge_draws(rows) if row["recipe"].startswith("gptq")]
    assert merged["draws"] == 2 and merged["draw_seeds"] == [5, 9]
    assert merged["nll_delta"] == pytest.approx((rows[2]["nll_delta"] + rows[4]["nll_delta"]) / 2, abs=1e-6)
    assert merged["nll_delta_between"] == pytest.approx(abs(rows[2]["nll_delta"] - rows[4]["nll_delta"]) / 2**0.5, abs=1e-6)


def test_a_row_is_measured_again_by_calling_it_again(measured):
    for row in measured[1]:
        with pytest.raises(
            qjax.QjaxError, match=f"row {row['key']} is of a function .* call qjax.sweep_function with them again"
        ):
            request_of(row)


def test_misuse_is_named_before_anything_is_computed(tmp_path):
    wrong = {
        "needs calibration data": {"calibration": None},
        "calibration batch 0 of seed 0 is measured too": {"calibration": BATCHES[1:]},
        "calibration batch 1 of seed 7 is measured too": {"calibration": {2: CALIBRATION, 7: [*CALIBRATION, BATCHES[1]]}},
        r"calibration by seed has \['a'\], expected numbers": {"calibration": {"a": CALIBRATION}},
        "match(es)? no kernel": {"rules": ["nothing=none"]},
        r"losses of shape \(\)": {"losses": lambda *args: losses(*args)[0].mean()},
        "function with its losses fails on a batch, TypeError": {"losses": lambda logits: logits},
        "the function itself fails on a batch, TypeError": {"batches": [(jnp.ones((2, 3)),)]},
        "recipes is 'rtn:int4-g4', expected several": {"recipes": "rtn:int4-g4"},
    }
    for told, options in wrong.items():
        with pytest.raises(qjax.QjaxError, match=told):
            sweep(tmp_path, **options)
    assert not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(qjax.QjaxError, match="losses on batches are not finite"):
        sweep(tmp_path, ["rtn:int4-g8"], losses=lambda logits, x, t: jnp.log(-jnp.abs(logits[..., 0])))

"""Tuning: decisions on simulated losses, and the command on a tiny model, stopped and resumed."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.cli import app as cli
from qjax.errors import QjaxError
from qjax.linear import cast_tree
from qjax.sweep.store import ROWS, read_rows
from qjax.sweep.tune import Bound, Loss, by_cost, holds, loss_of, named_recipes, parse_bound, tune
from tests.conftest import byte_tokenizer, random_model, tiny_config

NAN = float("nan")


def test_the_first_whose_whole_interval_is_within():
    losses = {"a": Loss(0.03, 0.02, 0.04), "b": Loss(0.009, 0.007, 0.011), "c": Loss(0.005, 0.002, 0.008), "d": Loss(0, 0, 0)}
    asked = []
    measure = lambda recipe: (asked.append(recipe), losses[recipe])[1]  # noqa: E731
    done = tune(list(losses), measure, Bound(0.01, True))
    assert (done.accepted, done.nearest, asked) == ("c", "c", ["a", "b", "c"])
    assert [trial.accepted for trial in done.trials] == [False, False, True]
    none = tune(["a", "b"], measure, Bound(0.001, True))
    assert none.accepted is None and none.nearest == "b"


def test_no_interval_that_crosses_the_bound_is_ever_accepted():
    rng, bound = np.random.default_rng(0), Bound(0.01, True)
    for _ in range(500):
        value, reach = rng.normal(0.01, 0.01), abs(rng.normal(0, 0.01))
        loss = Loss(value, value - reach, value + reach)
        done = tune(["x"], lambda recipe, loss=loss: loss, bound)
        assert (done.accepted == "x") == (value + reach <= 0.01)
    for unknown in (Loss(0.0, NAN, NAN), Loss(NAN, NAN, NAN), Loss(math.inf, math.inf, math.inf), Loss(-1.0, -2.0, math.inf)):
        assert not holds(unknown, bound)
        assert tune(["x"], lambda recipe, loss=unknown: loss, bound).accepted is None
    known = {"x": Loss(NAN, NAN, NAN), "y": Loss(0.5, 0.4, 0.6)}
    assert tune(["x", "y"], known.get, bound).nearest == "y"


def test_losses_in_the_terms_of_the_bound():
    share, number = Bound(0.01, True), Bound(0.1, False)
    before = {"perplexity": 20.0, "accuracy:cloze": 0.5}
    row = {"nll_delta": 0.01, "nll_delta_low": -0.01, "nll_delta_high": 0.03, "kl": 0.2, "kl_stderr": 0.05, "documents": 10**6}
    row |= {"accuracy_delta:cloze": -0.02, "accuracy_delta_low:cloze": -0.05, "accuracy_delta_high:cloze": 0.01}
    np.testing.assert_allclose(loss_of(row, before, "perplexity", share), np.expm1([0.01, -0.01, 0.03]))
    np.testing.assert_allclose(loss_of(row, before, "perplexity", number), 20 * np.expm1([0.01, -0.01, 0.03]))
    np.testing.assert_allclose(loss_of(row, before, "kl", number), [0.2, 0.2 - 0.098, 0.2 + 0.098], atol=1e-4)
    np.testing.assert_allclose(loss_of(row, before, "cloze", share), [0.04, -0.02, 0.1])
    np.testing.assert_allclose(loss_of(row, before, "cloze", number), [0.02, -0.01, 0.05])
    assert math.isnan(loss_of(row | {"nll_delta_high": None}, before, "perplexity", share).high)
    assert loss_of({"nll_delta": 900.0}, before, "perplexity", share).value > 1e300
    for of in ("perplexity", "kl", "cloze"):  # rows that somebody has taken figures from
        assert np.isnan(loss_of({}, before, of, number)).all() and np.isnan(loss_of(row, {}, of, share)).all() == (
            of == "cloze"
        )
    with pytest.raises(QjaxError, match="answers no question of cloze"):
        loss_of(row, before | {"accuracy:cloze": 0.0}, "cloze", share)


def test_bounds_and_lists():
    assert parse_bound("1%", "perplexity") == Bound(0.01, True) and parse_bound(" 0.02", "kl") == Bound(0.02, False)
    assert str(parse_bound("0.5%", "cloze")) == "0.5%"
    for text, of, told in (
        ("0%", "perplexity", "above 0"),
        ("-1%", "perplexity", "expected a share as 1%"),
        ("one", "kl", "expected a share"),
        ("1%", "kl", "give a number of nats"),
    ):
        with pytest.raises(QjaxError, match=told):
            parse_bound(text, of)
    names = named_recipes(["int8", "llm_int8:int8-channel-sym-max", "nf4"])
    assert names[-1] == "nf4" and len(names) == len(set(names)) and any("smoothquant" in name for name in names)
    with pytest.raises(QjaxError, match="no recipes"):
        tune([], lambda recipe: Loss(0, 0, 0), Bound(1, True))


def test_the_cheapest_first():
    model = random_model(tiny_config(), byte_tokenizer())
    int8, int4 = "int8-channel-sym-max", "int4-channel"
    given = [
        f"rtn:{int8}",
        "none",
        f"rtn:{int8}/int8-token",
        "rtn:int4-g16",
        f"rtn:{int4}/int4-token",
        f"rtn:{int4}",
        f"llm_int8:{int8}",
    ]
    assert by_cost(model, given) == [given[i] for i in (4, 5, 3, 2, 6, 0, 1)]
    half = model._replace(params=cast_tree(model.params, jnp.bfloat16))
    assert by_cost(half, ["none", "bf16", f"rtn:{int8}"])[0] == f"rtn:{int8}"
    caches = ["none", "kv:int8-token", "kv:int4-token"]
    assert by_cost(model, caches) == caches[::-1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    save_huggingface(folder / "tiny", random_model(tiny_config(), byte_tokenizer()))
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 12)
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_the_command(checkpoint, tmp_path, capsys):
    def tuned(within, of="kl", *more):
        text = f"text:{checkpoint / 'text.txt'}"
        options = ("--within", within, "--of", of, "--data", text, "--convention", "windows-32", "--out", tmp_path)
        return run(capsys, "tune", checkpoint / "tiny", "--recipes", "rtn:int8-channel,rtn:int2-g16", *options, *more)

    code, _, said = tuned("1e-12")
    assert code == 3, said
    assert "rtn:int8-channel comes nearest" in said and not (tmp_path / "model").exists()
    before, coarse, fine = read_rows(tmp_path / ROWS)
    assert [row["recipe"] for row in (before, coarse, fine)] == ["none", "rtn:int2-g16", "rtn:int8-channel"]
    rows, between = (tmp_path / ROWS).read_bytes(), f"{(coarse['kl'] * fine['kl']) ** 0.5:.9f}"
    code, said, _ = tuned(between)
    assert code == 0 and (tmp_path / "tune.md").exists()
    assert (tmp_path / ROWS).read_bytes() == rows  # nothing was measured again
    assert load(str(tmp_path / "model")).recipe == "rtn:int8-channel"
    table = (tmp_path / "tune.md").read_text()
    assert tuned(between)[0] == 0 and (tmp_path / "tune.md").read_text() == table
    (tmp_path / "model.json").write_text('{"key": "of another model"}')
    code, _, said = tuned(between)
    assert code == 2 and "holds rtn:int8-channel of another model, text of calibration or version; give another --out" in said
    code, _, said = tuned("10")
    assert code == 2 and "holds rtn:int8-channel, not rtn:int2-g16" in said
    code, _, said = tuned("1%")
    assert code == 2 and "give a number of nats" in said


def test_what_is_wrong_with_the_last_recipe_is_told_before_the_first_is_measured(checkpoint, tmp_path, capsys):
    text, other = checkpoint / "text.txt", tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    options = ("--convention", "windows-32", "--calibration-windows", 4, "--out", tmp_path, "--data", f"text:{text}")
    wrong = {
        ("smoothquant(alpha=1.5)+rtn:int8-channel", other): "alpha",
        ("hadamard(block=17)+rtn:int8-channel", other): "block",
        ("gptq:int8-channel", text): "measured and calibrated",
    }
    for (recipe, calibration), said in wrong.items():
        words = ("--recipes", f"rtn:int2-g16,{recipe}", "--calibration", f"text:{calibration}")
        code, _, told = run(capsys, "tune", checkpoint / "tiny", *words, *options)
        assert code == 2 and said in told and not (tmp_path / ROWS).exists(), told


def test_rules_are_no_part_of_what_losses_are_from(checkpoint, tmp_path, capsys):
    text, rules = f"text:{checkpoint / 'text.txt'}", ("--rule", "down_proj=rtn:int2-g16")  # by Hugging Face's name
    options = ("--within", "1e9", "--data", text, "--convention", "windows-32", "--out", tmp_path)
    for _ in range(2):  # made, then found again
        code, _, said = run(capsys, "tune", checkpoint / "tiny", "--recipes", "rtn:int8-channel", *options, *rules)
        assert code == 0, said
    assert [row["recipe"] for row in read_rows(tmp_path / ROWS)] == ["none", "rtn:int8-channel; mlp/down=rtn:int2-g16"]
    assert load(str(tmp_path / "model")).recipe == "rtn:int8-channel; mlp/down=rtn:int2-g16"

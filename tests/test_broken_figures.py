"""No figure comes of numbers that are NaN or infinite: every evaluation stops and names the model and what was measured."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.capture import Batch, capture_statistics
from qjax.errors import QjaxError
from qjax.evaluate.choices import accuracy
from qjax.evaluate.corpora import Corpus
from qjax.evaluate.divergence import divergence
from qjax.evaluate.generate import generate_text
from qjax.evaluate.likelihood import likelihoods, make_pair
from qjax.evaluate.perplexity import perplexity
from qjax.evaluate.questions import Question, Task
from qjax.models import walk
from qjax.models.parameters import flatten, unflatten
from qjax.numbers import NotFiniteError, require_finite
from qjax.sweep.columns import undefined
from qjax.sweep.store import read_rows
from tests.report_rows import measured_row

CORPUS = Corpus("wise", ("It was the age of wisdom, it was the age of foolishness. " * 3,), "0")
GOLD_FIRST = tuple(Question((("is it", " one"), ("is it", " two")), 0, (3, 3)) for _ in range(3))
TASKS = [Task("first", "choices", GOLD_FIRST, "0"), Task("words", "last-word", GOLD_FIRST, "0")]
RUNS = {
    "perplexity": (lambda model, whole: perplexity(model, CORPUS, "windows-16"), "losses on wise, windows-16"),
    "choices": (lambda model, whole: accuracy(model, TASKS[0]), "task first: "),
    "last word": (lambda model, whole: accuracy(model, TASKS[1]), "task words: "),
    "likelihood": (lambda model, whole: likelihoods(model, [[make_pair(model, "a", "b")]]), "1 of 1 likelihoods"),
    "divergence": (lambda model, whole: divergence(model, whole, CORPUS, "windows-16"), "broken against random"),
    "from a broken one": (lambda model, whole: divergence(whole, model, CORPUS, "windows-16"), "random against broken"),
    "generation": (lambda model, whole: generate_text(model, "It", 3), "next tokens' largest logits"),
    "drawing": (lambda model, whole: generate_text(model, "It", 3, temperature=1.0), "next tokens' largest logits"),
}


@pytest.fixture(scope="module")
def broken(tiny_model):
    """A model whose activations overflow to NaN although every weight is finite; and one with an impossible token."""
    leaves = flatten(tiny_model.params)
    for name in ("up", "down"):
        leaves[f"block_1/mlp/{name}/kernel"] = leaves[f"block_1/mlp/{name}/kernel"] * 3e38
    return tiny_model._replace(params=unflatten(leaves), name="broken")


@pytest.mark.parametrize("run", RUNS)
def test_every_evaluation_stops(run, broken, tiny_model):
    evaluate, named = RUNS[run]
    with pytest.raises(NotFiniteError, match=re.escape(named)) as error:
        evaluate(broken, tiny_model)
    assert "broken" in str(error.value) and "not finite" in str(error.value) and "\n" not in str(error.value)


def test_an_impossible_token_has_no_likelihood(tiny_model):
    leaves = flatten(tiny_model.params)
    path = "head/kernel" if "head/kernel" in leaves else "head/output/kernel"
    leaves[path] = leaves[path].at[:, 5].set(-jnp.inf)
    with pytest.raises(NotFiniteError):
        perplexity(tiny_model._replace(params=unflatten(leaves)), CORPUS, "windows-16")


def test_what_is_finite_is_let_through():
    require_finite(np.array([1.0, -3e38]), "losses", model="a")
    require_finite(3, "losses", model="a")
    with pytest.raises(NotFiniteError, match=r"^a: 2 of 3 losses are not finite"):
        require_finite(jnp.array([1.0, jnp.nan, -jnp.inf]), "losses", model="a")


def test_figures_of_a_row():
    """Standard errors and intervals of a single window are NaN, and nothing else may be."""
    row = {"nll": 1.0, "window_nll": [1.0, 2.0], "nll_stderr": np.nan, "nll_delta_low": np.nan, "accuracy_stderr:a": np.nan}
    assert undefined(row | {"recipe": "none", "measures": [], "bits": None, "tokens": 3}) == []
    bad = {"nll": np.nan, "window_nll": [1.0, np.inf], "kl": jnp.nan, "nll_stderr": np.inf, "accuracy:a": np.float32(np.nan)}
    assert undefined(row | bad) == ["nll", "window_nll", "nll_stderr", "kl", "accuracy:a"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_row_with_a_broken_figure_is_not_read(value, tmp_path):
    row = measured_row("none")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"nll": "HERE"}).replace('"HERE"', value) + "\n")
    with pytest.raises(QjaxError, match=r"line 1 is not a JSON object .*no finite number"):
        read_rows(tmp_path / "rows.jsonl")


def test_statistics_of_calibration(broken):
    """The layer whose input is broken is named."""
    part = walk.body(broken.config)[-1]
    params = walk.params_of(part, broken.params)
    batch = Batch((jnp.full((1, 8, broken.config.hidden_size), jnp.nan),))
    with pytest.raises(NotFiniteError, match="input of block_1/attention/q/kernel is not finite"):
        capture_statistics(part.module, params, [batch], {"attention/q/kernel": 32}, ["hessian"], prefix=part.prefix)

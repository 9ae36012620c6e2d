"""Sweeps on small trained models: fewer bits never help, 8 bits cost next to nothing, calibrated methods keep more."""

import itertools

import pytest

import qjax
from qjax.evaluate.corpora import Corpus, load_corpora

from .paths import real_data


@pytest.mark.parametrize(
    ("name", "group"), [("stories260K-hf", "g32"), pytest.param("babyllama-hf", "g64", marks=pytest.mark.slow)]
)
def test_perplexity_does_not_fall_with_fewer_bits(name, group, tmp_path):
    model = qjax.load(real_data(f"models/{name}"))
    corpora = load_corpora([f"text:{real_data('text/tinystories_val.txt')}"])
    recipes = tuple(f"rtn:int{bits}-{group}" for bits in (8, 4, 3, 2))
    convention = qjax.parse_convention("windows-256")
    rows = qjax.run_sweep(model, qjax.Sweep(recipes, corpora, convention, max_windows=16), tmp_path)
    perplexities = [row["perplexity"] for row in rows]
    assert all(more > 0.999 * fewer for fewer, more in itertools.pairwise(perplexities))  # 8 bits differ by noise
    assert perplexities[1:] == sorted(perplexities[1:]) and rows[1]["perplexity_ratio"] < 1.005


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bundled", "models/babyllama-hf"])
def test_calibrated_methods_keep_more(name, tmp_path):
    """Perplexity on a trained model: gptq and awq below rtn, the best recipe far below."""
    if name == "bundled":
        model, corpus, calibration = qjax.load(name), qjax.load_corpus("python-docs"), "python-docs"
    else:
        model, text = qjax.load(real_data(name)), real_data("text/tinystories_val.txt").read_text()
        corpus, calibration = Corpus("head", (text[:200_000],), "h"), Corpus("tail", (text[-400_000:],), "t")
    tokens = qjax.load_calibration(model, calibration, windows=16)
    recipes = ("rtn:int3-g128", "gptq:int3-g128@parallel", "awq:int3-g128@parallel", "gptq(clip=mse):int3-g128")
    sweep = qjax.Sweep(recipes, (corpus,), qjax.parse_convention("windows-256"), 16, calibration=tokens)
    cost = {row["recipe"]: row["nll_delta"] for row in qjax.run_sweep(model, sweep, tmp_path)}
    assert cost["gptq:int3-g128@parallel"] < 0.8 * cost["rtn:int3-g128"]
    assert cost["awq:int3-g128@parallel"] < 0.8 * cost["rtn:int3-g128"]
    assert cost["gptq(clip=mse):int3-g128"] < 0.6 * cost["rtn:int3-g128"]

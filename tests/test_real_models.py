"""The sweep on small trained models: fewer bits never help, and 8 bits cost next to nothing."""

import pytest

import qjax
from qjax.evaluate.corpora import load_corpora

from .paths import real_data


@pytest.mark.parametrize(("name", "group"), [("stories260K-hf", "g32"), ("babyllama-hf", "g64")])
def test_perplexity_does_not_fall_with_fewer_bits(name, group, tmp_path):
    model = qjax.load(real_data(f"models/{name}"))
    corpora = load_corpora([f"text:{real_data('text/tinystories_val.txt')}"])
    recipes = tuple(f"rtn:int{bits}-{group}" for bits in (8, 4, 3, 2))
    convention = qjax.parse_convention("windows-256")
    rows = qjax.run_sweep(model, qjax.Sweep(recipes, corpora, convention, max_windows=16), tmp_path)
    perplexities = [row["perplexity"] for row in rows]
    assert perplexities == sorted(perplexities)
    assert rows[1]["perplexity_ratio"] < 1.005

"""report/training.py: the table of models that were trained, and the figure of a run."""

import pytest

from qjax.errors import QjaxError
from qjax.report.rendering import to_markdown
from qjax.report.reports import tables
from qjax.report.training import loss_figure
from tests.dictionary import CELLS, undescribed

BASE = {"kind": "training", "model": "m", "corpus": "t", "corpus_fingerprint": "a", "convention": "windows-256", "steps": 0}
BASE |= {"training_tokens": 0, "training_seconds": 0.0, "nll": 2.0, "size_bytes": 9, "bits_per_weight": None}
ROWS = [
    {**BASE, "key": "1", "model_recipe": "none", "treatment": "none", "perplexity": 8.0},
    {
        **BASE,
        "key": "2",
        "model_recipe": "rtn:int2-g128",
        "treatment": "rounded",
        "perplexity": 12.0,
        "bits_per_weight": 2.140625,
    },
    {
        **BASE,
        **{"key": "3", "model_recipe": "rtn:int2-g128, trained", "treatment": "trained as quantized", "perplexity": 9.0},
        **{"training_tokens": 819200, "training_seconds": 61.2, "bits_per_weight": 2.140625},
    },
    {
        **BASE,
        "key": "4",
        "corpus": "u",
        "corpus_fingerprint": "b",
        "model_recipe": "none",
        "treatment": "LoRA",
        "perplexity": 5.0,
    },
]


def test_changes_are_from_the_model_as_it_is_on_the_same_text():
    ((name, table),) = tables(ROWS)
    assert name == "training"
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in to_markdown(table).splitlines() if line.startswith("| ")
    ]
    assert [line[5] for line in lines[-4:]] == ["-", "50.0", "12.5", "-"]
    assert lines[-2] == ["t", "rtn:int2-g128, trained", "trained as quantized", "2.141", "9.00", "12.5", "819", "61"]
    assert undescribed(ROWS, CELLS) == []


def test_the_figure_of_a_run():
    steps = [{"step": i + 1, "loss": 5 - 0.1 * i + (i % 2)} for i in range(40)]
    (axes,) = loss_figure(steps).axes
    whole, smooth = (line.get_xydata() for line in axes.lines)
    assert len(whole) == 40 and whole[3].tolist() == [4, pytest.approx(5.7)]
    assert len(smooth) == 39 and smooth[0].tolist() == [2, pytest.approx((5 + 5.9) / 2)]
    with pytest.raises(QjaxError, match="needs steps"):
        loss_figure([])

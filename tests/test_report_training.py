"""report/training.py: the table of models that were trained, and the figure of a run."""

import math

import pytest

from qjax.errors import QjaxError
from qjax.report.rendering import to_markdown
from qjax.report.reports import tables
from qjax.report.training import loss_figure
from qjax.sweep.measurements.perplexity import difference
from tests.dictionary import CELLS, undescribed

BASE = {"kind": "training", "model": "m", "corpus": "t", "corpus_fingerprint": "a", "convention": "windows-256", "steps": 0}
BASE |= {"training_tokens": 0, "training_seconds": 0.0, "size_bytes": 9, "bits_per_weight": None, "model_recipe": "none"}


def measured(perplexity: float, spread: float = 0.5, **columns: object) -> dict[str, object]:
    """A row of two documents, whose losses are so far from their mean."""
    nll = math.log(perplexity)
    return {
        **BASE,
        "perplexity": perplexity,
        "perplexity_stderr": 0.25,
        "nll": nll,
        "window_nll": [nll - spread, nll + spread],
    } | {
        **{"window_tokens": [1, 1], "window_documents": [0, 1]},
        **columns,
    }


NONE = measured(8.0, key="1", treatment="none")
ROWS = [
    NONE,
    *(
        row | difference(row, NONE)
        for row in (
            measured(12.0, 0.499, key="2", treatment="rounded", model_recipe="rtn:int2-g128", bits_per_weight=2.140625),
            measured(
                *(9.0, 0.4),
                **{"key": "3", "model_recipe": "rtn:int2-g128, trained", "treatment": "trained as quantized"},
                **{"training_tokens": 819200, "training_seconds": 61.2, "bits_per_weight": 2.140625},
            ),
        )
    ),
    measured(5.0, key="4", treatment="none", corpus="u", corpus_fingerprint="b"),
]


def test_changes_are_from_the_model_as_it_is_on_the_same_text():
    ((name, table),) = tables(ROWS)
    assert name == "training"
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in to_markdown(table).splitlines() if line.startswith("| ")
    ]
    assert [line[5:7] for line in lines[-4:]] == [["-", "-"], ["+50.00 ± 0.15", "-"], ["≈ +13 ± 11", "75"], ["-", "-"]]
    assert lines[-2][:5] == ["t", "rtn:int2-g128, trained", "trained as quantized", "2.141", "9.00 ± 0.25"]
    assert lines[-2][7:] == ["819", "61"]
    assert undescribed(ROWS, CELLS) == []


def test_the_figure_of_a_run():
    steps = [{"step": i + 1, "loss": 5 - 0.1 * i + (i % 2)} for i in range(40)]
    (axes,) = loss_figure(steps).axes
    whole, smooth = (line.get_xydata() for line in axes.lines)
    assert len(whole) == 40 and whole[3].tolist() == [4, pytest.approx(5.7)]
    assert len(smooth) == 39 and smooth[0].tolist() == [2, pytest.approx((5 + 5.9) / 2)]
    with pytest.raises(QjaxError, match="needs steps"):
        loss_figure([])

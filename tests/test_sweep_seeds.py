"""Several seeds in one sweep: rows and keys of each seed's own sweep, what is shared, what is refused."""

import numpy as np
import pytest

from qjax.calibrate.tokens import Calibration
from qjax.errors import QjaxError
from qjax.sweep import runner
from qjax.sweep.quantizer import made_together, part_of
from qjax.sweep.runner import Watcher, cell_states, run_sweep
from qjax.sweep.store import ROWS, read_rows
from qjax.sweep.worker import Job

from .test_sweep import CORPORA, measured, plan

RECIPES = ("rtn:int3-g8", "gptq:int3-g8@parallel", "awq:int3-g8@parallel")
SEEDS = (0, 5)


def drawn(seed):
    tokens = np.random.default_rng(seed).integers(0, 256, (4, 32))
    return Calibration(tokens.astype(np.int32), None, "novel", "another text")


def asked(**changes):
    options = {"corpora": CORPORA[:1], "max_windows": 4, "seeds": SEEDS, "calibration": tuple(map(drawn, SEEDS))}
    return plan(*RECIPES, **(options | changes))


def test_rows_are_those_of_each_seeds_own_sweep(tiny_model, tmp_path):
    """To the last bit and under the same keys: what a seed alone measured is not measured again."""
    singles = [
        run_sweep(tiny_model, asked(seeds=(), seed=seed, calibration=drawn(seed)), tmp_path / str(seed)) for seed in SEEDS
    ]
    seen = []

    class Log(Watcher):
        def cell(self, number, total, recipe, corpus):
            seen.append(recipe)

    rows = run_sweep(tiny_model, asked(), tmp_path / "both", Log())
    assert measured(rows) == measured([*singles[0], *singles[1][2:]])  # of seed 5 all but the model as it is and rtn
    assert rows[2]["window_nll"] != rows[4]["window_nll"]
    assert seen == ["none", RECIPES[0], *(f"{recipe}, seed {seed}" for seed in SEEDS for recipe in RECIPES[1:])]
    run_sweep(tiny_model, asked(), tmp_path / "0")
    assert len(read_rows(tmp_path / "0" / ROWS)) == 6
    assert [
        row["state"] for row in cell_states(tiny_model, asked(seeds=(5, 0), calibration=(drawn(5), drawn(0))), tmp_path / "0")
    ] == [
        *("open", "open"),  # the model as it is and rtn, with the first seed
        *["done"] * 4,
    ]


def test_what_one_draw_gives_is_shared_by_its_cells_alone(tiny_model):
    cells = runner._cells(tiny_model, asked(corpora=CORPORA))
    assert [(cell.treatment.recipe, cell.sweep.seed) for cell in cells[::2]] == [
        ("none", 0), (RECIPES[0], 0), (RECIPES[1], 0), (RECIPES[2], 0), (RECIPES[1], 5), (RECIPES[2], 5),
    ]  # fmt: skip
    assert made_together(cells[4:], 8) == [0, 1, 2, 3] and made_together(cells[6:], 8) == [0, 1]
    assert part_of(cells, 2) == 2
    assert str(Job(cells[-1], {"recipe": RECIPES[2]})) == f"{RECIPES[2]}, seed 5 on reversed"
    assert str(Job(cells[2], {"recipe": RECIPES[0]})) == f"{RECIPES[0]} on dickens"


def test_a_number_of_seeds_is_that_many_from_0_and_what_reads_no_data_has_one_row(tiny_model, tmp_path):
    assert plan("nf4", seeds=3).seeds == (0, 1, 2)
    states = cell_states(tiny_model, plan("nf4", corpora=CORPORA[:1], seeds=3), tmp_path)
    assert [(row["recipe"], row["seed"]) for row in states] == [("none", 0), ("rtn:nf4-g64", 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": drawn(0)}, "1 calibration for 2 seeds"),
        ({"calibration": tuple(map(drawn, range(3)))}, "3 calibration for 2 seeds"),
        ({"calibration": None}, "need calibration data"),
        ({"seeds": (1, 1)}, "seeds 1, 1: expected each once"),
        ({"calibration": (drawn(0), drawn(1)._replace(source="f1"))}, "both measured and calibrated on"),
    ],
)
def test_seeds_need_what_each_drew(tiny_model, tmp_path, changes, message):
    with pytest.raises(QjaxError, match=message):
        cell_states(tiny_model, asked(**changes), tmp_path)

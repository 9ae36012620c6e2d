"""Plans: constants are found again from rows that were made of them, and estimates are their sums."""

import json

import numpy as np
import pytest

from qjax.errors import QjaxError
from qjax.report.plan import CONSTANTS, TERMS, duration, fit_constants, llama_shapes, plan_table, read_constants, terms
from qjax.sweep.store import ROWS, read_rows
from tests.paths import REPOSITORY

TRUE = {"once": 0.5, "layers": 1e-3, "products": 2e-11, "feedback": 3e-11}
SIZES = [(128, 2, 1024), (256, 4, 4096), (512, 4, 4096), (512, 8, 1024), (512, 2, 16384), (1024, 4, 4096)]


def sizes_of(width: int, depth: int, tokens: int) -> dict[str, int]:
    return terms(llama_shapes(width, depth), 13 * depth * width**2, 1000, width, tokens)


@pytest.fixture
def rows() -> list[dict[str, object]]:
    made = {"kind": "scaling", "device": "cpu: A", "code": "a", "versions": "1", "work": "gptq", "vocabulary": 1000}
    found = []
    for width, depth, tokens in SIZES:
        sizes = sizes_of(width, depth, tokens)
        costs = {"seconds": sum(TRUE[name] * sizes[name] for name in TRUE), "peak_bytes": 10**8 + 4 * sizes["parameters"]}
        shape = {"width": width, "depth": depth, "tokens": tokens, "parameters": sizes["parameters"]}
        found.append({"key": f"{shape}"} | made | shape | costs)
    return found


def test_terms():
    sizes = terms([(2, 3), (4, 2)], 100, 50, 4, 10)
    assert sizes == {
        "once": 1, "layers": 2, "parameters": 100, "weights": 14, "products": 140, "logits": 2000, "feedback": 12 + 32,
        "largest": 16, "states": 40,
    }  # fmt: skip
    assert sum(a * b for a, b in llama_shapes(8, 2)) == 13 * 2 * 64


def test_constants_are_found_again(rows):
    found = fit_constants([{**rows[0], "code": "earlier", "seconds": 1e6}, *rows])
    assert found["seconds"]["gptq"] == pytest.approx(TRUE, rel=1e-3)
    assert found["peak_bytes"]["gptq"] == pytest.approx({"once": 1e8, "parameters": 4, "largest": 0, "states": 0}, abs=1)
    assert max(found["seconds_miss"]["gptq"], found["peak_bytes_miss"]["gptq"]) < 1e-3
    assert found["parameters"] == [13 * 2 * 128**2, 13 * 4 * 1024**2] and found["tokens"] == [1024, 16384]


def test_misses_are_of_points_that_constants_have_not_seen(rows):
    rows = [{**row, "seconds": seconds} for row, seconds in zip(rows[:2], (1.0, 3.0), strict=True)]
    for row in rows:
        row["work"] = "load"  # two points and two constants, which fit both
    found = fit_constants(rows)
    assert found["seconds_miss"]["load"] > 0.3
    assert fit_constants(rows[:1])["seconds_miss"]["load"] is None


def test_a_plan_is_sums_of_constants(rows, tmp_path):
    path = tmp_path / "constants.json"
    path.write_text(json.dumps(fit_constants(rows)))
    sizes = sizes_of(512, 4, 4096)
    table = plan_table(read_constants(path), sizes, tokens=4096, title="M", here="cpu: A")
    (line,) = table.rows
    assert line["stage"] == "quantize, gptq:int4-g64"
    assert line["seconds"] == pytest.approx(rows[2]["seconds"], rel=1e-3)
    assert line["peak_bytes"] == pytest.approx(rows[2]["peak_bytes"], rel=1e-3)
    notes = " ".join(table.notes)
    assert "runs on cpu: A" in notes and "times differ" not in notes and "beyond" not in notes
    for tokens, here, said in ((10**6, "cpu: A", "is beyond that"), (4096, "cpu: B", "This machine is cpu: B")):
        other = plan_table(read_constants(path), sizes_of(512, 4, tokens), tokens=tokens, title="M", here=here)
        assert said in " ".join(other.notes)


def test_broken_constants(rows, tmp_path):
    path = tmp_path / "constants.json"
    with pytest.raises(QjaxError, match=r"there is no .*constants.json; `python experiments/scaling.py` makes it"):
        read_constants(path)
    good = fit_constants(rows)
    for broken in (
        [],
        {**good, "tokens": 3},
        {**good, "seconds": {"gptq": {"once": -1.0}}},
        {**good, "seconds": {"gptq": {"unheard": 1.0}}},
        {**good, "seconds": {"gptq": {"once": float("nan")}}},
        {name: value for name, value in good.items() if name != "device"},
        {**good, "peak_bytes": {}},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(QjaxError, match=r"holds no constants of a plan|is not a JSON object"):
            read_constants(path)
    for text in ('{"a":' * 3000 + "1" + "}" * 3000, '{"seconds": {"load": {"once": 1e999}}}', "x"):
        path.write_text(text)
        with pytest.raises(QjaxError, match=r"constants\.json (holds no constants|is not a JSON object)"):
            read_constants(path)


def test_durations():
    assert [duration(x) for x in (0.0351, 42, 119, 120, 7199, 20000)] == [
        "0.035 s",
        "42 s",
        "120 s",
        "2.0 min",
        "120 min",
        "5.6 h",
    ]


def test_the_package_s_constants_are_those_of_the_committed_rows():
    folder = REPOSITORY / "results" / "scaling"
    assert CONSTANTS.exists() == (folder / ROWS).exists()
    if CONSTANTS.exists():
        found, committed = fit_constants(read_rows(folder / ROWS)), read_constants()
        assert {name: found[name] for name in ("device", "versions", "code")} == {
            name: committed[name] for name in ("device", "versions", "code")
        }
        for cost in TERMS:
            for work, constants in found[cost].items():
                assert np.allclose(list(committed[cost][work].values()), list(constants.values()), rtol=1e-3), (cost, work)

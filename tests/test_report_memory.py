"""The memory table: published sizes of Llama-2-7B, exact small cases, errors."""

import csv
import io
import math

import pytest

from qjax.errors import QjaxError
from qjax.report.memory import memory_table, parameters_table
from qjax.report.tables import to_csv, to_markdown

LLAMA_2_7B = ([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]) * 32  # q k v o, gate up, down
EMBEDDINGS = (2 * 32000 * 4096, 2)  # and head, in float16


def sizes(table) -> dict[str, float]:
    return {row["format"]: int(row["bytes"]) for row in csv.DictReader(io.StringIO(to_csv(table)))}


def test_llama_2_7b():
    formats = ("int8-channel", "int4-g128-sym", "int3-g128-sym", "int2-g64-sym", "nf4-g64", "nf4-g64-dq")
    gigabytes = {
        name: round(size / 1e9, 2) for name, size in sizes(memory_table(LLAMA_2_7B, [EMBEDDINGS], formats=formats)).items()
    }
    assert gigabytes == {
        "fp32": 26.95,
        "fp16": 13.48,
        "int8-channel": 7.00,
        "int4-g128-sym": 3.86,
        "int3-g128-sym": 3.05,
        "int2-g64-sym": 2.35,
        "nf4-g64": 4.17,
        "nf4-g64-dq": 3.87,
    }


def test_exact_bytes():
    # 128 x 4 weights: 256 bytes of 4-bit codes, 8 scales of 4 bytes; 10 float32 values stay.
    found = sizes(memory_table([(128, 4)], [(10, 4)], formats=["nf4-g64"]))
    assert found == {"fp32": 4 * 522, "fp16": 2 * 522, "nf4-g64": 256 + 32 + 40}


def test_relative_size_is_of_the_whole_model_in_that_type():
    row = memory_table([(128, 4)], [(10, 4)], formats=["nf4-g64"]).rows[-1]
    assert row["ratio_to_fp32"] == 328 / 2088
    assert row["ratio_to_fp16"] == 328 / 1044
    assert row["bits_per_weight"] == 4.5


def test_parameters_only():
    found = sizes(parameters_table(7e9, formats=("int4-g128", "int4-g128-sym", "nf4-g64-dq")))
    assert found["fp32"] == 28_000_000_000
    assert found["fp16"] == 14_000_000_000
    assert found["int4-g128"] == 7_000_000_000 * 4.15625 / 8
    assert found["int4-g128-sym"] == 7_000_000_000 * 4.125 / 8
    assert math.isclose(found["nf4-g64-dq"], 7e9 * 4.127 / 8, rel_tol=1e-4)
    text = to_markdown(parameters_table(7e9))
    assert "7 billion parameters, every one quantized" in text
    assert "| INT4        | int4-g128    |           4.156 |        3.64 |  3,636,718,750 |        13.0 |        26.0 |" in text


def test_small_models_are_counted_in_small_units():
    assert "memory (kB)" in to_markdown(memory_table([(64, 64)] * 30))


@pytest.mark.parametrize("parameters", [0, -1, math.nan, math.inf])
def test_senseless_number_of_parameters(parameters):
    with pytest.raises(QjaxError, match="at least 1"):
        parameters_table(parameters)


def test_nothing_to_quantize():
    with pytest.raises(QjaxError, match=r"toy.*no linear kernels"):
        memory_table([], [(10, 4)], title="toy")
    with pytest.raises(QjaxError, match="unknown grid"):
        memory_table([(4, 4)], formats=["int9-g128"])

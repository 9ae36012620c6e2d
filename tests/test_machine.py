"""The kind of machine that a row names."""

import os

import pytest

from qjax.report.rerun_table import rerun_table, unequal
from qjax.sweep import machine
from tests.report_rows import measured_row

INTEL = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor  @ 2.50GHz
stepping\t: 8
flags\t\t: fpu sse2 avx avx2 fma avx512f amx_bf16

processor\t: 1
flags\t\t: avx512_bf16
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        (INTEL, "Intel(R) Xeon(R) Processor @ 2.50GHz (6-143-8) avx avx2 fma avx512f amx_bf16"),
        (ARM, "(0x41-0xd40) asimd bf16 sve"),
    ],
)
def test_a_processor_is_told_apart_by_what_it_computes_with(tmp_path, monkeypatch, told, kind):
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert machine.processor().endswith(f"{kind} x2")
    assert machine.device() == f"cpu: {machine.processor()}"
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.processor().endswith(" x2")


def test_figures_of_another_kind_of_machine_need_not_be_equal_to_the_last_bit():
    old = measured_row("rtn:int4-g128", 0.1, window_nll=[600.0, 610.0], window_tokens=[255, 255])
    near = old | {"perplexity": old["perplexity"] * 1.001, "window_nll": [600.7, 609.5]}
    far = near | {"perplexity": old["perplexity"] * 1.02}
    assert unequal(old, near) == ["perplexity", "window_nll"]
    assert unequal(old, near | {"device": "cpu: other"}) == []
    assert unequal(old, far | {"device": "cpu: other"}) == ["perplexity"]
    assert unequal(old, old | {"device": "cpu: other", "tokens": 7}) == ["tokens"]
    assert any("Another kind of machine" in note for note in rerun_table(old, near | {"device": "cpu: other"}).notes)
    assert not any("Another kind" in note for note in rerun_table(old, near).notes)

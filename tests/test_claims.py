"""Claims of cells: one worker a cell, whoever dies or freezes."""

import dataclasses
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from qjax.calibrate.tokens import Calibration
from qjax.errors import QjaxError, QjaxWarning
from qjax.numbers import NotFiniteError
from qjax.place import this_place
from qjax.sweep import claims, runner, store, worker
from qjax.sweep.claims import CLAIMS, Claims, holders
from qjax.sweep.quantizer import made_together, part_of
from qjax.sweep.runner import Watcher, cell_states, run_sweep
from qjax.sweep.store import LAYERS, LOCK, ROWS, append_row, locked, read_rows

from .sweep_torture import rounds
from .test_sweep import CORPORA, measured, plan

ASKED = plan("rtn:int4-channel", "nf4", max_windows=2)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told otherwise."""
    now = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    return now


def claim_of_another(folder, *keys, place="another machine", process=1):
    """A claim as a worker of another machine writes it."""
    path = folder / CLAIMS / f"other-{len(list(folder.glob(CLAIMS + '/*')))}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"place": place, "host": "node7", "process": process, "cells": dict.fromkeys(keys, "a cell")}))
    return path


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_seen_by_others_until_it_is_given_back(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    one.hold({"a": "rtn:int4-g16 on novel", "b": "nf4 on novel"})
    assert one.others() == {} and set(one.cells()) == {"a", "b"}
    assert {key: str(holder) for key, holder in other.others().items()} == dict.fromkeys(
        "ab", f"process {os.getpid()} on {os.uname().nodename}"
    )
    one.hold({"c": "nf4 on novel"})
    assert set(other.others()) == set(one.cells()) == {"c"}
    other.hold({"a": "rtn:int4-g16 on novel"})
    one.release()
    assert [set(holder.cells) for holder in holders(tmp_path)] == [{"a"}]
    other.release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_claim_of_a_dead_process_of_this_machine_is_void_at_once(tmp_path):
    path = claim_of_another(tmp_path, "a", place=this_place(), process=dead_process())
    living = claim_of_another(tmp_path, "b", place=this_place(), process=os.getpid())
    elsewhere = claim_of_another(tmp_path, "c", process=dead_process())
    assert set(Claims(tmp_path).others()) == {"b", "c"}
    assert not path.exists() and living.exists() and elsewhere.exists()


@pytest.mark.parametrize("skew", [-1e6, 0, 1e6])
def test_a_claim_whose_heartbeat_stands_still_is_void_after_the_stated_time(tmp_path, clock, skew):
    """By the clock of the one who looks: what the other machine's clock says does not matter."""
    path = claim_of_another(tmp_path, "a", process=os.getpid())
    looking = Claims(tmp_path, stale_seconds=60)

    def beat(moment):
        os.utime(path, (1e9 + skew + moment,) * 2)

    beat(0)
    assert "a" in looking.others()
    clock[0] += 59
    assert "a" in looking.others()
    beat(-30)  # a clock that was set back
    clock[0] += 59
    assert "a" in looking.others()
    clock[0] += 59
    assert "a" in looking.others()
    clock[0] += 2
    assert looking.others() == {} and not path.exists()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e300])
def test_times_that_no_thread_can_wait(tmp_path, seconds):
    with pytest.raises(QjaxError, match=r"stale_seconds .*: expected more than 0, to 1e"):
        Claims(tmp_path, stale_seconds=seconds)


def test_a_worker_beats_and_loses_what_is_taken_from_it(tmp_path):
    one = Claims(tmp_path, stale_seconds=0.1)
    one.hold({"a": "nf4 on novel"})
    (path,) = (tmp_path / CLAIMS).iterdir()
    begin, deadline = path.stat().st_mtime_ns, threading.Event()
    for _ in range(200):
        if path.stat().st_mtime_ns != begin:
            break
        deadline.wait(0.02)
    assert path.stat().st_mtime_ns != begin
    path.unlink()
    deadline.wait(0.1)
    assert one.cells() == {} and not path.exists()  # a beat does not bring it back
    one.hold({"b": "nf4 on novel"})
    assert set(one.cells()) == {"b"}
    one.release()


@pytest.mark.parametrize(
    "content", ["", '{"place": "x", "cel', "[1]", '{"place": "x", "host": "y", "process": -1, "cells": {}}']
)
def test_what_is_no_whole_claim_is_removed(tmp_path, content):
    claim_of_another(tmp_path, "a").write_text(content)
    claim_of_another(tmp_path, "b")
    assert set(Claims(tmp_path).others()) == {"b"}
    assert len(list(holders(tmp_path))) == 1


def test_workers_at_once_measure_every_cell_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "FIRST_PAUSE", 0.01)
    expected = run_sweep(tiny_model, ASKED, tmp_path / "single")
    found, new = {}, []

    class Log(Watcher):
        def row(self, row, is_new):
            new.append(row["key"]) if is_new else None

    def run(name):
        found[name] = run_sweep(tiny_model, ASKED, tmp_path / "many", Log(), workers=3)

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [measured(rows) for rows in found.values()] == [measured(expected)] * 3
    rows = read_rows(tmp_path / "many" / ROWS)
    assert sorted(new) == sorted(row["key"] for row in rows) == sorted(row["key"] for row in expected)
    layers = [json.loads(line) for line in (tmp_path / "many" / LAYERS).read_text().splitlines()]
    assert len({(row["key"], row["path"]) for row in layers}) == len(layers) == 2 * 14 * 2
    assert not (tmp_path / "many" / CLAIMS).exists()


def test_a_cell_without_figures_is_tried_once_a_run(tiny_model, tmp_path, monkeypatch):
    """By whichever of those at work; all of them say why. The next run tries again."""
    monkeypatch.setattr(worker, "FIRST_PAUSE", 0.01)
    asked, tried, told = dataclasses.replace(ASKED, corpora=CORPORA[:1]), [], []
    honest, together = runner._measured, threading.Barrier(2)

    def measure(cell, head, **options):
        if head["recipe"] == "rtn:int4-channel":
            tried.append(head["key"])
            raise NotFiniteError("losses: not finite")
        return honest(cell, head, **options)

    class Both(Watcher):
        def cell(self, number, total, recipe, corpus):
            if recipe == "none":
                together.wait(600)  # both have begun

        def waiting(self, cells):
            if together.n_waiting:
                together.wait(600)

    def run():
        with pytest.raises(
            NotFiniteError, match=r"^rtn:int4-channel on dickens has no row: losses: not finite; every"
        ) as error:
            run_sweep(tiny_model, asked, tmp_path, Both(), workers=2)
        told.append(str(error.value))

    monkeypatch.setattr(runner, "_measured", measure)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tried) == 1 and len(told) == 2 and told[0] == told[1]
    assert [row["recipe"] for row in read_rows(tmp_path / ROWS)] == ["none", "rtn:nf4-g64"]
    assert not (tmp_path / CLAIMS).exists()
    with pytest.raises(NotFiniteError):
        run_sweep(tiny_model, asked, tmp_path)
    assert len(tried) == 2


def test_a_baseline_without_figures_stops_all(tiny_model, tmp_path, monkeypatch):
    """Those who wait for it do not try it again."""
    other = Claims(tmp_path)
    other.join()
    keys = [row["key"] for row in cell_states(tiny_model, ASKED, tmp_path)]
    other.tell_broken(keys[0], "none on dickens has no row: losses: not finite")
    monkeypatch.setattr(runner, "_measured", lambda *args, **options: pytest.fail("tried"))
    with pytest.raises(NotFiniteError, match=r"^none on dickens has no row"):
        run_sweep(tiny_model, dataclasses.replace(ASKED, corpora=CORPORA[:1]), tmp_path)
    other.release()
    assert not (tmp_path / CLAIMS).exists()


def test_what_a_killed_run_found_broken_is_forgotten(tmp_path):
    killed = claim_of_another(tmp_path, "b", place=this_place(), process=dead_process())
    one, other = Claims(tmp_path), Claims(tmp_path)
    one.tell_broken("a", "of before")
    one.join()
    assert one.broken() == {} and not killed.exists()
    one.tell_broken("a", "why")
    other.join()
    one.release()
    assert other.broken() == {"a": "why"}
    other.release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


class Frozen(Watcher):
    """Loses its claims within its first cell, while `meanwhile` happens."""

    def __init__(self, folder, meanwhile=lambda: None):
        self.folder, self.meanwhile, self.new = folder, meanwhile, []

    def batch(self, done, total):
        if self.folder is not None:
            folder, self.folder = self.folder, None
            next((folder / CLAIMS).iterdir()).unlink()
            self.meanwhile()

    def row(self, row, is_new):
        self.new.append(is_new)


def test_a_worker_that_lost_its_claim_writes_no_second_row(tiny_model, tmp_path):
    """Frozen within a cell, which another then measures with all that are left."""
    frozen = Frozen(tmp_path, lambda: run_sweep(tiny_model, ASKED, tmp_path))
    rows = run_sweep(tiny_model, ASKED, tmp_path, frozen)
    assert rows == read_rows(tmp_path / ROWS) and frozen.new == [False] * 6


def test_a_lost_cell_that_nobody_measured_is_measured_again(tiny_model, tmp_path):
    frozen = Frozen(tmp_path)
    assert run_sweep(tiny_model, ASKED, tmp_path, frozen) == read_rows(tmp_path / ROWS) and frozen.new == [True] * 6


def test_a_worker_waits_for_others_and_says_for_whom(tiny_model, tmp_path, monkeypatch):
    """For the baseline in the middle of a cell too."""
    monkeypatch.setattr(worker, "FIRST_PAUSE", 0.01)
    asked = dataclasses.replace(ASKED, corpora=CORPORA[:1])
    keys = [row["key"] for row in cell_states(tiny_model, asked, tmp_path)]
    baseline, last = claim_of_another(tmp_path, keys[0]), claim_of_another(tmp_path, keys[2])
    assert [row["state"] for row in cell_states(tiny_model, asked, tmp_path)] == [
        "process 1 on node7", "open", "process 1 on node7"
    ]  # fmt: skip
    waited = []

    class Log(Watcher):
        def waiting(self, cells):
            waited.append(cells)
            (baseline if baseline.exists() else last).unlink()

    rows = run_sweep(tiny_model, asked, tmp_path, Log())
    assert waited == [{f"{name} on dickens": "process 1 on node7"} for name in ("none", "rtn:nf4-g64")]
    assert [row["key"] for row in rows] == keys
    assert measured(rows) == measured(run_sweep(tiny_model, asked, tmp_path / "single"))
    assert [row["state"] for row in cell_states(tiny_model, asked, tmp_path)] == ["done"] * 3


def test_claims_are_given_back_on_the_way_out(tiny_model, tmp_path):
    class Stop(Watcher):
        def batch(self, done, total):
            assert [set(holder.cells.values()) for holder in holders(tmp_path)] == [{"none on dickens", "none on reversed"}]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(tiny_model, ASKED, tmp_path, Stop())
    assert not (tmp_path / CLAIMS).exists()


def test_what_shares_work_is_claimed_together(tiny_model):
    names = ("gptq:int4-g8@parallel", "rtn:int4-g8", "gptq:int3-g8@parallel", "gptq:int2-g8@parallel")
    tokens = Calibration(np.zeros((2, 32), np.int32))
    cells = runner._cells(tiny_model, plan(*names, calibration=tokens))
    assert [part_of(cells, workers) for workers in (1, 2, 3, 9)] == [3, 2, 1, 1]
    assert made_together(cells, 3) == [0, 1]  # the baseline on both texts
    assert made_together(cells[2:], 3) == [0, 1, 4, 5, 6, 7]
    assert made_together(cells[2:], 2) == [0, 1, 4, 5]
    assert made_together(cells[4:], 2) == [0, 1]
    assert made_together([], 2) == []


def test_a_lock_that_is_held_is_waited_for_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.05)
    held, release = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    threading.Timer(0.2, release.set).start()
    with pytest.warns(QjaxWarning, match="held by another process"):
        append_row(tmp_path / ROWS, {"key": "a"})
    thread.join()
    assert json.loads((tmp_path / ROWS).read_text()) == {"key": "a"}


@pytest.mark.slow
def test_workers_that_are_killed_and_frozen(tmp_path):
    counts = rounds(3, 0, tmp_path)
    assert counts["killed before the end"] and counts["frozen before the end"]

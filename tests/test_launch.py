"""Workers of one sweep by launchers, the command's options for them, and what it says of cells that are not measured."""

import json
import os
import re
import signal
import sys

import pytest

from qjax.cli import app as cli
from qjax.errors import QjaxError
from qjax.sweep import launch, runner
from qjax.sweep.claims import CLAIMS
from qjax.sweep.launch import LOGS, Launched, WorkerError, parse_launcher, run_workers
from qjax.sweep.store import LAYERS, ROWS

from .test_cli import checkpoint, succeeds, sweep_arguments  # noqa: F401 - a fixture


def saying(text):
    """A command that does what a text of Python says."""
    return [sys.executable, "-c", text]


def marks(folder):
    """A command that leaves a file of its own in a folder."""
    return saying(f"import os, pathlib; pathlib.Path({str(folder)!r}, str(os.getpid())).touch()")


def test_launchers_by_name():
    assert parse_launcher("local") == ("local", {})
    assert parse_launcher("slurm(timeout_min=60, slurm_partition=gpu,mem_gb=1.5)") == (
        "slurm",
        {"timeout_min": 60, "slurm_partition": "gpu", "mem_gb": 1.5},
    )
    for wrong in ("slrm", "slurm(60)", "local(a=1)", "slurm(", "", "slurm(workers=3)", "ray(folder=a)"):
        with pytest.raises(QjaxError, match="launcher"):
            parse_launcher(wrong)


def test_workers_all_run_and_the_first_failure_is_told(tmp_path):
    waits = []
    run_workers(marks(tmp_path), 3, tmp_path, on_wait=lambda: waits.append(1))
    assert len(list(tmp_path.iterdir())) == 3 and waits
    text = "import sys; print('error: no such model', file=sys.stderr); sys.exit(3)"
    with pytest.raises(WorkerError, match=r"worker 1 of 1 ended with exit code 3: no such model$") as failed:
        run_workers(saying(text), 1, tmp_path)
    assert failed.value.code == 3
    text = "import sys; print('error: stopped; what was finished is kept, and so on', file=sys.stderr); sys.exit(3)"
    with pytest.raises(WorkerError, match=r"with exit code 3: stopped$"):  # which is said once, of all
        run_workers(saying(text), 1, tmp_path)
    with pytest.raises(WorkerError, match="was ended by signal 9: it said nothing") as failed:
        run_workers(saying("import os; os.kill(os.getpid(), 9)"), 1, tmp_path)
    assert failed.value.code == 128 + signal.SIGKILL


def test_workers_are_ended_with_the_one_who_launched_them(tmp_path):
    text = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(600)"

    def stop():
        if len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_workers(saying(text), 2, tmp_path, on_wait=stop)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_workers_are_ended_together(monkeypatch):
    """All are told first; then those that go on get what is left of the time, not all of it each."""
    said, now = [], [0.0]

    def end(name, seconds):
        said.append((name, seconds))
        now[0] += 20  # some of the time goes by

    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    workers = [Launched(lambda: None, lambda n=n: said.append(n), lambda s, n=n: end(n, s)) for n in "abc"]
    launch._stop([*workers, Launched(lambda: None, lambda: said.append("a job"))])
    assert said == ["a", "b", "c", "a job", ("a", 30.0), ("b", 10.0), ("c", 0.0)]


def test_a_worker_that_does_not_stop_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.2)
    text = "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    text += f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(600)"

    def stop():
        if list(tmp_path.iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_workers(saying(text), 1, tmp_path, on_wait=stop)
    (path,) = tmp_path.iterdir()
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.name), 0)


def test_jobs_of_slurm(tmp_path):
    pytest.importorskip("submitit")
    run_workers(marks(tmp_path), 2, tmp_path, "slurm(cluster=local,timeout_min=2)")
    assert len(list(tmp_path.iterdir())) == 2  # and no logs
    with pytest.raises(WorkerError, match="exit code 5: so it is") as failed:
        run_workers(saying("import sys; print('so it is', file=sys.stderr); sys.exit(5)"), 1, tmp_path, "slurm(cluster=local)")
    assert failed.value.code == 5 and (tmp_path / LOGS).exists()
    with pytest.raises(QjaxError, match=r"launcher slurm: .*no_such_option"):
        run_workers(marks(tmp_path), 1, tmp_path, "slurm(cluster=local,no_such_option=1)")


@pytest.mark.slow
def test_tasks_of_ray(tmp_path):
    ray = pytest.importorskip("ray")
    try:
        run_workers(marks(tmp_path), 2, tmp_path, "ray(num_cpus=0.5)")
        assert len(list(tmp_path.iterdir())) == 2
        with pytest.raises(WorkerError, match="exit code 5"):
            run_workers(saying("import sys; sys.exit(5)"), 1, tmp_path, "ray")
    finally:
        ray.shutdown()


def test_two_processes_share_a_sweep(checkpoint, tmp_path, capsys):  # noqa: F811
    """`--workers 2`, and what a dry run says before and after."""
    options = ("--recipes", "rtn:int8-channel,nf4,rtn:int3-channel", "--max-windows", "2")
    arguments = sweep_arguments(checkpoint, tmp_path / "new", *options)
    assert "4 cells: 0 done, 0 claimed, 4 open" in succeeds(capsys, *arguments, "--dry-run")
    assert not (tmp_path / "new").exists()
    printed = succeeds(capsys, *arguments, "--workers", "2")
    assert "rtn:int3-channel" in printed
    rows = [json.loads(line) for line in (tmp_path / "new" / ROWS).read_text().splitlines()]
    assert sorted(row["recipe"] for row in rows) == ["none", "rtn:int3-channel", "rtn:int8-channel", "rtn:nf4-g64"]
    layers = [json.loads(line) for line in (tmp_path / "new" / LAYERS).read_text().splitlines()]
    assert len({(row["key"], row["path"]) for row in layers}) == len(layers) == 3 * 14
    assert not (tmp_path / "new" / CLAIMS).exists()
    dry = succeeds(capsys, *arguments, "--dry-run")
    assert "4 cells: 4 done, 0 claimed, 0 open" in dry and all(row["key"] in dry for row in rows)


def test_the_exit_code_of_a_worker_is_kept(checkpoint, tmp_path, capsys):  # noqa: F811
    arguments = sweep_arguments(checkpoint, tmp_path, "--methods", "rtn", "--rule", "nothing=none", "--workers", "2")
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: worker [12] of 2 ended with exit code 2: .*matches no kernel", last)


def test_an_interruption_says_what_is_kept(checkpoint, tmp_path, capsys, monkeypatch):  # noqa: F811
    def interrupted(model, sweep, folder, watcher, **options):
        watcher.cell(1, 5, "none", "text")
        watcher.cell(2, 5, "nf4", "text")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_sweep", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in sweep_arguments(checkpoint, tmp_path, "--recipes", "nf4")])
    assert stopped.value.code == 130
    assert f"1 of 5 cells are kept in {tmp_path / ROWS}" in capsys.readouterr().err


def test_workers_are_told_every_option_that_was_given(checkpoint, tmp_path, capsys, monkeypatch):  # noqa: F811
    def refused(command, workers, folder, launcher, **options):
        told.extend(command)
        raise WorkerError("refused", 7)

    told = []
    monkeypatch.setattr(launch, "run_workers", refused)
    options = ["--methods", "nf4", "--rule=up=none", "--rule=down=none", "--max-windows=0", "--speed", "--workers=2"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in sweep_arguments(checkpoint, tmp_path, *options)])
    assert stopped.value.code == 7
    expected = {"--methods=nf4", "--rule=up=none", "--rule=down=none", "--max-windows=0", "--speed", "--workers=2"}
    assert {*expected, "--launcher=none", f"--out={tmp_path}"} <= set(told) and "--dry-run" not in told

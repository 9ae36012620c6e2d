"""How the command line ends: signals, our own faults, memory, files; `test_cli.py` has a user's mistakes."""

import errno
import os
import re
import signal
from pathlib import Path

import pytest

from qjax.cli import app as cli


class PanicException(BaseException):
    """As libraries written in Rust raise."""


@pytest.fixture
def ends(monkeypatch, capsys):
    """Runs a command in which something happens; its exit code and the line on stderr."""

    def run(happens):
        monkeypatch.setattr("qjax.report.lists.formats_table", happens)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["formats"])
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        return stopped.value.code, printed.err.strip()

    return run


def test_mistakes_in_a_command_line_are_of_one_kind():
    """Whichever Click is Typer's."""
    assert cli.USAGE.__name__ == "UsageError"


def raising(error):
    def happens():
        raise error

    return happens


@pytest.mark.parametrize(
    ("name", "code", "how"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "stopped by SIGTERM"), ("SIGHUP", 129, "stopped by SIGHUP")],
)
def test_signals(name, code, how, ends):
    number = getattr(signal, name)
    before = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    inherited = signal.signal(number, before)  # tests may run where a signal is ignored: behind a shell's &
    try:
        found = ends(lambda: os.kill(os.getpid(), number))
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, inherited)
    assert found == (code, f"{how}; what was finished is kept, the same command goes on from there")


def test_a_signal_that_is_ignored_stays_ignored(ends, monkeypatch):
    """As nohup does it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code, _ = ends(lambda: os.kill(os.getpid(), signal.SIGHUP) or raising(OSError(errno.ENOSPC, "full", "a"))())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 2


@pytest.mark.parametrize("error", [TypeError("not\nthis"), RecursionError("deep"), PanicException("missing token")])
def test_our_own_fault(error, ends):
    code, line = ends(raising(error))
    assert code == 1 and f"a fault of qjax itself ({type(error).__name__}: " in line
    file = Path(re.search(r"\S*qjax-error-\S+\.txt", line)[0])
    assert "raise error" in file.read_text() and type(error).__name__ in file.read_text()
    file.unlink()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: memory does not suffice"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), "error: memory does not suffice"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "error: /a/b: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "error: /a: Permission denied"),
    ],
)
def test_what_the_machine_lacks(error, line, ends):
    code, printed = ends(raising(error))
    assert code == 2 and printed.startswith(line)

"""The command line: parse, call, print. Exit codes and one line on stderr:

    2                a user's mistake, a file that cannot be read or written, memory that does not suffice
    1                our own fault, with the traceback in a file (and `rerun` where figures differ)
    130, 143, 129    Ctrl-C, SIGTERM, SIGHUP: what was finished is kept

JAX and everything that needs it is imported inside the commands, so that `qjax --help` answers at once.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer

from qjax.cli.evaluate import evaluate, generate, info
from qjax.cli.export import convert, dequantize, export
from qjax.cli.lists import columns, formats, recipes
from qjax.cli.merge import merge
from qjax.cli.quantize import quantize
from qjax.cli.results import compare, report, rerun
from qjax.cli.sweep import sensitivity, sweep
from qjax.cli.train import train
from qjax.cli.tune import tune
from qjax.errors import KEPT, QjaxError, one_line
from qjax.printable import printable

OUR_FAULT = 1
STOPPED = 128  # exit code after a signal, less its number
USAGE = typer.BadParameter.__base__  # of all mistakes in a command line: Click's, or that of the Click within Typer
STOPPING = ("SIGTERM", "SIGHUP")  # what ends a run as Ctrl-C does: a scheduler's time limit, a terminal that is closed

app = typer.Typer(
    name="qjax",
    help="Quantize language models and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    sweep,
    quantize,
    dequantize,
    export,
    convert,
    merge,
    sensitivity,
    tune,
    evaluate,
    generate,
    info,
    report,
    rerun,
    compare,
    formats,
    recipes,
    columns,
):
    app.command({"evaluate": "eval"}.get(command.__name__))(command)
app.add_typer(train)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the command; whatever goes wrong is one line and an exit code.

    arguments: words of the command line, None for those of this process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own remarks, as on slow compilation, are not for the terminal
    try:
        with warnings.catch_warnings(), _stopped_by_signals() as received:
            warnings.showwarning = _print_warning
            try:
                code = app(arguments, standalone_mode=False)
                sys.exit(code if isinstance(code, int) else 0)
            except KeyboardInterrupt:
                sys.exit(STOPPED + signal.SIGINT)
    except SystemExit as stop:
        if stop.code == STOPPED + signal.SIGINT:
            number = received[0] if received else signal.SIGINT
            how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
            _end(f"{how}; {KEPT}, the same command goes on from there", STOPPED + number)
        raise
    except QjaxError as error:
        _end(f"error: {error}", 2)
    except USAGE as error:
        if told := error.format_message().rstrip("."):  # else it was the help
            _end(f"error: {told} (see {error.ctx.command_path if error.ctx else 'qjax'} --help)", 2)
        sys.exit(2)
    except OSError as error:
        _end(f"error: {error.filename or 'file'}: {error.strerror or error}; see to that path, or give another", 2)
    except BaseException as error:  # also a panic of a library, which is no Exception
        if _is_memory(error):
            _end("error: memory does not suffice; give a smaller model, fewer or shorter windows, or a larger machine", 2)
        _end(
            f"error: this is a fault of qjax itself ({type(error).__name__}: {str(error)[:200]}); please report it with "
            f"{_kept_traceback(error)}, which has the details",
            OUR_FAULT,
        )


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """Signals that end a run raise KeyboardInterrupt meanwhile, and are listed; those that are ignored (nohup) stay so."""
    received, before = [], {}

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]  # no SIGHUP on Windows
        before = {number: signal.signal(number, stop) for number in known if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or on a device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def _kept_traceback(error: BaseException) -> Path | str:
    """The file that an unexpected error's traceback was written to."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="qjax-error-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(f"{' '.join(sys.argv)}\n{text}")
    except OSError:
        return " ".join(text.split())
    return Path(file.name)


def _print_warning(message: Warning | str, *_: object) -> None:
    typer.echo(printable("warning: " + " ".join(str(message).split())), err=True)


def _end(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        typer.echo(one_line(message), err=True)
    sys.exit(code)

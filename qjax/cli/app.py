"""The command line: parse, call, print. Exit code 2 and one line for a user's mistake; 130 when interrupted.

JAX and everything that needs it is imported inside the commands, so that `qjax --help` answers at once.
"""

import sys
import warnings

import typer

from qjax.cli.evaluate import evaluate, generate, info
from qjax.cli.lists import columns, formats, recipes
from qjax.cli.quantize import quantize
from qjax.cli.results import compare, report, rerun
from qjax.cli.sweep import sensitivity, sweep
from qjax.errors import QjaxError

INTERRUPTED = 130  # exit code after Ctrl-C

app = typer.Typer(
    name="qjax",
    help="Quantize language models and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (sweep, quantize, sensitivity, evaluate, generate, info, report, rerun, compare, formats, recipes, columns):
    app.command({"evaluate": "eval"}.get(command.__name__))(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs the command and turns a user's mistake into one line and exit code 2.

    arguments: words of the command line, None for those of this process.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            app(arguments)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("interrupted; what was finished is kept, the same command goes on from there", err=True)
        raise
    except QjaxError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")


def _print_warning(message: Warning | str, *_: object) -> None:
    typer.echo("warning: " + " ".join(str(message).split()), err=True)


def _fail(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(2)

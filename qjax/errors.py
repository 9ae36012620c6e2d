"""The one exception that means "you asked for something qjax cannot do": its message is for a person."""

import contextlib
from collections.abc import Iterator

LONGEST = 1_000  # characters of a message
HEAD = 640  # of those, before the cut of a longer one; behind it is the remedy


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text as one line of at most `longest` characters, fit for any terminal: white space as single blanks, characters
    that print nothing (control characters, lone surrogates, changes of direction) as escapes, a long middle left out.
    """
    if len(text) > 4 * longest:  # whatever is quoted, no more of it is looked at
        text = f"{text[: 2 * longest]} ... {text[-2 * longest :]}"
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    if len(text) <= longest:
        return text
    head = longest * HEAD // LONGEST
    return f"{text[:head]} ... {text[head + 5 - longest :]}"


KEPT = "what was finished is kept"  # at the end of a run that was stopped


class QjaxError(Exception):
    """A user's mistake (bad path, unknown recipe, broken file). The message is one line (`one_line`) that says what was got,
    what was expected and what to do; the command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(str(message)))


class QjaxWarning(UserWarning):
    """Something that was done as asked but may not be what was meant; the command line prints it as one line."""


@contextlib.contextmanager
def code_of_others(what: str, advice: str) -> Iterator[None]:
    """Context in which code that is not ours runs: where it fails on a batch, a QjaxError says so, with the advice."""
    try:
        yield
    except QjaxError:
        raise
    except Exception as error:
        told = next(iter(str(error).splitlines()), "")
        raise QjaxError(f"{what} fails on a batch, {type(error).__name__}: {told}; {advice}") from error

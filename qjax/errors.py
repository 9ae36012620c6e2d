"""The one exception that means "you asked for something qjax cannot do": its message is for a person."""


class QjaxError(Exception):
    """A user's mistake (bad path, unknown recipe, broken file). The message is one line that says what was got,
    what was expected and what to do; the command line prints it without a traceback and exits with code 2.
    """


class QjaxWarning(UserWarning):
    """Something that was done as asked but may not be what was meant; the command line prints it as one line."""

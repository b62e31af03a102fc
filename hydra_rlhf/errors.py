"""The one exception that means "your input", as opposed to "our bug"."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line and says which and why.

    The command line prints it without a traceback and exits with code 2. Raise it before anything
    is written.
    """


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to what fits our one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]

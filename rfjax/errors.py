"""Errors that speak to the user: one sentence saying what is wrong and what to do, never a traceback."""

import errno
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave. The message is one sentence: what is wrong, and what to do."""


def _describe(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"The disk is full{where}; free some space and run the command again."
    return f"{error.strerror or error}{where}; check the path and its permissions."


def exit_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's main: UserError and OSError become `error: …` on stderr and exit code 2, Ctrl-C becomes 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            message, code = str(error), 2
        except OSError as error:
            message, code = _describe(error), 2
        except KeyboardInterrupt:
            message, code = "interrupted", 130
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)

    return wrapped

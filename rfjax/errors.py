"""Errors that speak to the user: one sentence saying what is wrong and what to do, never a traceback."""

import argparse
import contextlib
import difflib
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what one may have of it


class UserError(Exception):
    """A mistake in what the user gave. The message is one sentence: what is wrong, and what to do."""


class Parser(argparse.ArgumentParser):
    """One sentence in place of the usage; flags are written out, and the help keeps the lines of its description."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        kind, _, rest = message.partition("unrecognized arguments: ")
        if not kind and (flags := [word for word in rest.split() if word.startswith("--")]):
            name = flags[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            message = f"there is no {name}" + "".join(f" (is it {flag}?)" for flag in near)
        raise UserError(f"A flag is wrong: {message}; --help lists them all.")


def sentence(error: BaseException) -> str | None:
    """What to tell the user of an error: UserError and OSError (a full disk, a folder that cannot be written) have a sentence."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in FULL:
        return f"The disk is full{where}; free some space and run the command again."
    return f"{error.strerror or error}{where}; check the path and its permissions."


def exit_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's main: UserError and OSError become `error: …` and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, OSError) as error:
            message = sentence(error)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)  # files are closed; XLA, stopped inside a compilation, crashes when it is torn down
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    return wrapped


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """A check to call in long loops: it raises a Ctrl-C that Python lost, as it does in destructors and callbacks of C."""
    usual, came = signal.getsignal(signal.SIGINT), []

    def remember(*what):
        came.append(what)
        usual(*what)

    def check():
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield check  # Ctrl-C is the main thread's, or means nothing here
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, usual)

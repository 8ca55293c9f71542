"""Files that a user names: texts, and results, refused before the work where they cannot be written, there only when complete."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rfjax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None
# Of file systems without locks; 524 is Linux's own ENOTSUPP.
UNLOCKABLE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, 524)


def refuse_bucket(name: str | os.PathLike) -> None:
    """UserError for a bucket's address such as gs://…, which would become a folder here of that name."""
    if re.match(r"[a-z][a-z0-9]+:/", str(name)):  # pathlib makes one slash of two
        raise UserError(
            f"{name} is no folder of this machine; mount the bucket, and give the folder where it is mounted."
        )


def check_writable(name: str) -> None:
    """UserError where a file of this name cannot be written; asked before work whose result goes there."""
    refuse_bucket(name)
    folder = Path(name).absolute().parent
    if Path(name).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"{name} cannot be written; give a file in a folder that exists and can be written to."
        )


def lines(name: str | os.PathLike) -> list[str]:
    """The lines of a text in UTF-8, stripped; UserError where it cannot be read. A byte order mark is none of its characters."""
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"Cannot read {name}: {why}; give a text file in UTF-8.") from error
    return [line.strip() for line in text.splitlines()]


def prompts(name: str | os.PathLike) -> list[str]:
    """The prompts of a text file, one a line; UserError where there is none, or it cannot be read."""
    if not (found := [line for line in lines(name) if line]):
        raise UserError(f"{name} holds no prompt; write one a line.")
    return found


@contextlib.contextmanager
def replacing(name: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, which takes the name when all of it is there."""
    partial = Path(f"{name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, name)
    finally:
        partial.unlink(missing_ok=True)


def lock(handle: int, name: str, instead: str) -> None:
    """Keeps an open file or folder for this process until `handle` is closed. UserError where another one has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another command writes to {name} just now; {instead}, or wait for it.") from error
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise


@contextlib.contextmanager
def locked(folder: Path, instead: str) -> Iterator[None]:
    """Around what writes in a folder that one command at a time may write to. UserError where another one does."""
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            lock(handle, str(folder), instead)
        yield
    finally:
        if handle is not None:
            os.close(handle)

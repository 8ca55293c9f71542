"""Results in files that a user names: refused before the work where they cannot be written, there only when complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rfjax.errors import UserError


def check_writable(name: str) -> None:
    """UserError where a file of this name cannot be written; asked before work whose result goes there."""
    folder = Path(name).absolute().parent
    if Path(name).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"{name} cannot be written; give a file in a folder that exists and can be written to."
        )


@contextlib.contextmanager
def replacing(name: str) -> Iterator[Path]:
    """A path to write to, which takes the name when all of it is there."""
    partial = Path(f"{name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, name)
    finally:
        partial.unlink(missing_ok=True)

"""The folder of a run: what it is of, the scores of finished batches, and at its end the report."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rfjax.errors import UserError
from rfjax.files import refuse_bucket, replacing

RUN = "run.json"  # in a folder: what its scores are of
FILES = (".md", ".json", ".png", ".txt", ".csv", ".html")


def check(name: str, flag: str = "--out") -> None:
    """UserError where this, given by a flag, is no name for the folder of a run, or nothing can be written there."""
    refuse_bucket(name)
    path = Path(name)
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if there.is_dir() and not os.access(there, os.W_OK):
        raise UserError(f"{name} cannot be written; give a folder in one that can be written to.")
    if path.is_file() or (not path.is_dir() and path.suffix in FILES):
        raise UserError(
            f"{flag} takes a folder, and {name} is a file's name; give one such as {path.with_suffix('')}."
        )


@contextlib.contextmanager
def folder(name: str | None, run: dict[str, Any]) -> Iterator[Path]:
    """The folder that holds or will hold this run; without a name one that is gone when it is left.

    UserError where it holds the scores of another run.
    """
    if name is None:
        with tempfile.TemporaryDirectory() as place, folder(place, run) as same:
            yield same
        return
    place = Path(name)
    claim(place, run)
    (place / "batches").mkdir(exist_ok=True)
    yield place


def claim(place: Path, run: dict[str, Any]) -> None:
    """Notes in a folder what run it is of; UserError where it holds another."""
    run = json.loads(json.dumps(run, default=str))
    if not (place / RUN).exists():
        place.mkdir(parents=True, exist_ok=True)
        write(place / RUN, run)
    if differ := differences(read(place / RUN), run):
        raise UserError(
            f"{place} holds the scores of another run (not the same {differ}); give this one a folder of its own."
        )


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The names of what differs between two runs, by commas."""
    return ", ".join(sorted(key for key in one | other if one.get(key) != other.get(key)))


def fingerprint(params: Any) -> str:
    """Of the numbers in a tree of parameters, so that a run is not gone on with on other weights."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def write(path: Path, content: Any) -> None:
    """As JSON, there only when complete; arrays become lists, NaN and infinity null."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(plain(content), allow_nan=False, indent=1))


def read(path: Path) -> Any:
    """UserError for a file that is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged; remove it, and what it held is made anew.") from error


def plain(value: Any) -> Any:
    """Dicts, arrays and numbers → what JSON has."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def arrays(value: Any) -> Any:
    """The inverse of `plain` for scores: lists become arrays, null NaN."""
    if isinstance(value, dict):
        return {key: arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        return np.array([arrays(item) for item in value])
    return np.nan if value is None else value

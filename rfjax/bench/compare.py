"""Two runs side by side.

python -m rfjax.bench compare A.json B.json
"""

import json
import sys
from typing import Any

from rfjax.errors import UserError

SCHEMA, VERSION = "rfjax.bench", 3
MEASURED = ("first_frame", "parts", "sent", "stream", "peak")  # sections of figures
CONDITIONS = ("hardware", "versions", "commit", "run", "config")


def read(path: str) -> dict[str, Any]:
    """The figures of a run; UserError for a file that holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON"
        raise UserError(f"Cannot read {path}: {why}; give a file that --json wrote.") from error
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        raise UserError(f"{path} is not of this benchmark; give a file that --json wrote.")
    if told.get("version") != VERSION:
        raise UserError(f"{path} has version {told.get('version')}, not {VERSION}; measure it anew.")
    return told


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts → {"a.b.c": leaf}; lists are leaves."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        key: leaf for name in tree for key, leaf in flat(tree[name], f"{path}.{name}".lstrip(".")).items()
    }


def ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{figure: (of the first, of the second)} for every number that both have."""
    one, other = (flat({name: told[name] for name in MEASURED if name in told}) for told in (first, second))
    return {
        name: (one[name], other[name])
        for name in one
        if name in other and all(isinstance(told[name], int | float) for told in (one, other))
    }


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{condition: (of the first, of the second)} where the two differ."""
    one, other = (flat({name: told[name] for name in CONDITIONS if name in told}) for told in (first, second))
    pairs = {name: (one.get(name), other.get(name)) for name in {**one, **other}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def show(paths: list[str]) -> None:
    """Prints what differs in the conditions, then every figure of both and the second over the first."""
    if len(paths) != 2:
        raise UserError("compare takes two files that --json wrote: compare A.json B.json.")
    first, second = map(read, paths)
    apart = differences(first, second)
    for name, (one, other) in apart.items():
        print(f"warning: {name} differs: {one} and {other}")
    if any(name.startswith("hardware") for name in apart):
        print("warning: the hardware differs, so the ratios compare machines, not programs")
    found = ratios(first, second)
    if not found:
        raise UserError("The two runs measured nothing in common; measure the same --parts.")
    width = max(map(len, found))
    print(f"{'':{width}}{'A':>14}{'B':>14}{'B / A':>10}")
    for name, (one, other) in found.items():
        ratio = f"{other / one:>10.3f}" if one else f"{'':>10}"
        print(f"{name:{width}}{one:>14.6g}{other:>14.6g}{ratio}")
    sys.stdout.flush()

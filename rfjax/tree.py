"""Parameter trees as flat {path: leaf} maps, and ordered regex rules over those paths.

Sharding, weight decay, freezing, checkpoint names and conversion all speak of parameters by "/"-joined path.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict → {"a/b/c": leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} → nested dict."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def match(rules: Sequence[tuple[str, Any]], path: str) -> Any:
    """Value of the first rule whose regex matches the whole path; KeyError when none does."""
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise KeyError(f"no rule matches parameter {path!r}")

"""Where the parameters of a stage's networks come from: a file, or chance.

A stage says it as {name: Source}, so that shapes are known, and a checkpoint restored, before any file is read.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rfjax import checkpoint, data, sharding


class Source(NamedTuple):
    """Parameters of one network."""

    init: Callable[[Array], Any]  # key → random parameters, which also say shapes and dtypes
    path: str = ""  # .safetensors file or folder of a run; "" leaves them random


def shapes(sources: Mapping[str, Source]) -> dict[str, Any]:
    """{name: ShapeDtypeStructs}."""
    return {name: jax.eval_shape(source.init, jax.random.key(0)) for name, source in sources.items()}


def contents(sources: Mapping[str, Source]) -> dict[str, str]:
    """{path: what tells its contents from others} of those that are read; a file that is missing is told when it is read."""
    paths = [source.path for source in sources.values() if source.path and os.path.exists(source.path)]
    return {path: data.fingerprint(path) for path in paths}


def records(config: ConfigDict) -> dict[str, str]:
    """{folder: what tells its shards from others} of the records that a config names, by their names and sizes."""
    folders = [Path(config[name]) for name in ("data", "prompts") if config.get(name)]
    shards = {folder: sorted(folder.glob(f"*{data.SUFFIX}")) for folder in folders}
    lists = {folder: [(path.name, path.stat().st_size) for path in paths] for folder, paths in shards.items()}
    return {
        str(folder): hashlib.sha256(str(found).encode()).hexdigest()
        for folder, found in lists.items()
        if found
    }


def load(sources: Mapping[str, Source], key: Array, mesh: Mesh) -> dict[str, Any]:
    """{name: parameters}, each in its place on the mesh. UserError for a file that is missing, damaged or of another network."""

    def one(source, like):
        if not source.path:
            return jax.jit(source.init, out_shardings=sharding.place(like, mesh))(key)
        return checkpoint.load_params(source.path, sharding.placed(like, mesh))

    return {name: one(sources[name], like) for name, like in shapes(sources).items()}

"""Config files: Python files whose `get_config()` gives an `ml_collections.ConfigDict` of named sections.

A section maps one to one on a frozen dataclass, so a misspelt field is an error that says which.
"""

import ast
import contextlib
import dataclasses
import difflib
import os
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import ml_collections
from absl import flags

from rfjax.errors import UserError

Section = TypeVar("Section")
DTYPES = ("float32", "bfloat16", "float16")  # of activations and parameters
# What commands and stages read of a config: sections, and fields of its own. A stage of one's own may read others.
FIELDS = frozenset(
    """
    accumulate batch_size best blocks critic_init critic_optimizer critic_steps critic_warmup data decoder dit edge frames
    guidance init_from judged keep kl log_every lora loss made_by max_skipped mesh method negative_prompt optimizer prompt
    prompts record_batch record_frames rolling_share rollout save_every scored_blocks seed shard_records shards solver_steps
    square stage steps teacher teacher_dit text tiny umt5 vae vae_weights video weights world
    """.split()
)
# Fields that count something, and the least that they may be. Of 0 steps nothing is trained, and the parameters are written.
LEAST = {
    "seed": 0,
    "steps": 0,
    "batch_size": 1,
    "accumulate": 1,
    "save_every": 1,
    "log_every": 1,
    "keep": 1,
    "max_skipped": 1,
    "judged": 1,
    "frames": 1,
    "critic_steps": 0,
    "critic_warmup": 0,
    "solver_steps": 1,
    "record_frames": 1,
    "record_batch": 1,
    "shard_records": 1,
    "shards": 1,
}


def load(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """What `get_config()` of the file gives; `get_config("quick")` for a path that ends in `:quick`.

    Raises:
      UserError: no such file (says which there are), a file that fails or gives something else, or a misspelt field.
    """
    path, colon, variant = str(path).partition(".py:")
    path = Path(path + ".py" if colon else path)
    if not os.path.isfile(path):
        files = path.parent.glob("*.py") if os.path.isdir(path.parent) else []
        there = sorted(str(file) for file in files if "def get_config" in file.read_text(errors="replace"))
        near = difflib.get_close_matches(str(path), there, 3) or there
        hint = f"did you mean {' or '.join(near)}?" if near else "give the path of a Python file."
        raise UserError(f"There is no config {path}; {hint}")
    try:
        config = runpy.run_path(str(path))["get_config"](*[variant] if colon else [])
    except UserError:
        raise
    except ValueError as error:  # the file says itself what is wrong
        raise UserError(f"The config {path} says: {error}.") from error
    except Exception as error:  # whatever a user's file may raise
        raise UserError(f"The config {path} fails with {type(error).__name__}: {error}.") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config() in {path} must return an ml_collections.ConfigDict.")
    for field in sorted(set(config) - FIELDS):
        if near := difflib.get_close_matches(field, FIELDS, 1, cutoff=0.75):
            raise UserError(
                f"The config {path} sets {field!r}, which nothing reads; did you mean {near[0]!r}?"
            )
    return config


def build(dataclass: type[Section], config: ml_collections.ConfigDict, name: str) -> Section:
    """The dataclass that section `name` of the config describes; UserError when it is missing or wrong."""
    if name not in config:
        raise UserError(f"The config has no section {name!r}; add `config.{name} = dict(…)`.")
    fields = {field.name: field for field in dataclasses.fields(dataclass)}
    for field in config[name]:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, 1) or [", ".join(sorted(fields))]
            raise UserError(f"config.{name} has no field {field!r}; did you mean {near[0]}?")
    unset = dataclasses.MISSING
    needed = [field for field, of in fields.items() if of.default is of.default_factory is unset]
    if missing := [field for field in needed if field not in config[name]]:
        raise UserError(f"config.{name} lacks {', '.join(missing)}; add what is missing.")
    try:
        return dataclass(**config[name])
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{name} is not valid: {error}.") from error


def check_dtype(name: str) -> None:
    """ValueError for a dtype that no network here computes in."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")


def same(one: str, here, other: str, there) -> None:
    """UserError where two fields of a config differ that must not."""
    if here != there:
        raise UserError(f"config.{one} is {here} and config.{other} {there}; make them the same.")


def check(config: ml_collections.ConfigDict) -> None:
    """UserError for a field that counts something and cannot be what it is."""
    for name, least in LEAST.items():
        if name in config and (type(config[name]) is not int or config[name] < least):
            raise UserError(f"config.{name} is {config[name]!r}; set it to a whole number, {least} or more.")


@contextlib.contextmanager
def read_by(reader: str, config: ml_collections.ConfigDict):
    """Around what reads a config: a field that it lacks is a UserError, which names the field and the reader."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            here = frame.f_locals  # of ConfigDict's own functions: config.field, and config["field"]
            section, field = here.get("self"), here.get("attribute", here.get("key"))
            if not isinstance(section, ml_collections.ConfigDict) or not isinstance(field, str):
                continue
            if field not in section:
                near = difflib.get_close_matches(field, section, 1)
                hint = f"there is {near[0]!r}" if near else "add it"
                place = f"{_place(section, config)}.{field}"
                raise UserError(f"The config lacks {place}, which {reader} needs; {hint}.") from error
        raise


def _place(section: ml_collections.ConfigDict, config, name: str = "config") -> str:
    """Where a section is in a config, or in one that it is a copy of: "config.rollout", or "config" for the config itself."""
    return next((f"{name}.{field}" for field, value in config.items() if value == section), name)


def changed(config: ml_collections.ConfigDict, words: Sequence[str]) -> ml_collections.ConfigDict:
    """The config with fields set by words such as `--config.mesh.fsdp=8`; UserError for one that sets none."""
    for word in words:
        prefix, _, rest = word.partition(".")
        path, given, value = rest.partition("=")
        *sections, field = path.split(".")
        if prefix != "--config" or not given:
            raise UserError(f"There is no flag {word}; a field of the config is set by --config.FIELD=VALUE.")
        section = config
        try:
            for name in sections:
                section = section[name]
            old = section[field]
            section[field] = value if isinstance(old, str) else ast.literal_eval(value)
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise UserError(f"{word} changes nothing: give a field of the config and its value.") from error
    return config


def parse_flags(argv):
    """absl's flag parser; whatever is wrong with the flags or the config becomes one sentence."""
    for i, word in enumerate(argv):
        if word.startswith("--config"):
            name, given, value = word.partition("=")
            if name == "--config":
                load(value if given else " ".join(argv[i + 1 : i + 2]))
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        cause = error
        while cause.args and isinstance(cause.args[0], Exception):  # ml_collections wraps what it caught
            cause = cause.args[0]
        said = " ".join(str(cause.args[0] if cause.args else cause).split())
        # ml_collections gives a bare name, and the near one with the bare one again.
        said = re.sub(r"^'(\w+)'", r"the config has no field '\1'.", said)
        said = re.sub(r'Did you mean "(\w+)" instead of "\w+"', r"Did you mean '\1'", said)
        said = re.sub(r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is no whole number", said)
        said = re.sub(r"could not convert string to float: ('.*')", r"\1 is no number", said)
        raise UserError(f"A flag is wrong: {said}") from error

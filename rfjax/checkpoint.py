"""What a run keeps on disk: training states for resuming (orbax), bare parameters for use (safetensors).

A training checkpoint holds the state, the data iterator's position, and a description of the state, by which
one of another stage or size is told from a damaged one. Both kinds get their name only when complete.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from rfjax import tree
from rfjax.errors import UserError


class Restored(NamedTuple):
    """A training checkpoint that was read back."""

    step: int
    state: Any
    data: Any  # the data iterator's get_state()


class Checkpoints:
    """The newest `keep` training checkpoints of one run, under `folder`, each named by the steps done."""

    def __init__(self, folder: str | os.PathLike, keep: int, stage: str):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.folder, self.stage = Path(folder).absolute(), stage
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state, data) -> None:
        """Keeps a state after `step` steps; `data` is the iterator's get_state(), anything JSON takes."""
        if step in self._manager.all_steps():  # a damaged one that the run has come to again
            self._manager.delete(step)
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave({"position": data}),
            "about": ocp.args.JsonSave({"stage": self.stage, "leaves": describe(state)}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like) -> Restored | None:
        """The newest readable checkpoint, in the shapes, dtypes and shardings of `like`; None without one.

        Raises:
            UserError: the checkpoint is of another stage or of other sizes, or all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                self._check(step, like)
                items = {"state": ocp.args.StandardRestore(like), "data": ocp.args.JsonRestore()}
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
                return Restored(step, found["state"], found["data"]["position"])
            except UserError:
                raise
            except Exception as error:  # what a damaged file makes orbax raise is not one type
                print(
                    f"The checkpoint of step {step} is damaged ({type(error).__name__}); trying an older one."
                )
        if steps:
            raise UserError(
                f"All checkpoints in {self.folder} are damaged; delete the folder to start again."
            )
        return None

    def _check(self, step: int, like) -> None:
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if about["stage"] != self.stage:
            raise UserError(
                f"{self.folder.parent} holds a run of stage {about['stage']!r}, not {self.stage!r}; "
                "use another --workdir."
            )
        here = describe(like)
        differing = sorted(
            name for name in here | about["leaves"] if here.get(name) != about["leaves"].get(name)
        )
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.folder.parent} holds a run of other sizes or another optimiser: there, {name} is "
                f"{about['leaves'].get(name, 'missing')}, by this config {here.get(name, 'missing')}; "
                "use another --workdir."
            )


def describe(state) -> dict[str, str]:
    """{path: "float32[3, 4]"} of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _kind(leaf) for path, leaf in leaves}


def save_params(path: str | os.PathLike, params: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays to one safetensors file, names "/"-joined."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in tree.flatten(jax.device_get(params)).items()}
    unfinished.touch()
    mode = unfinished.stat().st_mode  # as the user's umask has it; safetensors lets nobody else read
    safetensors.numpy.save_file(flat, unfinished)
    unfinished.chmod(mode)
    os.replace(unfinished, path)


def load_params(path: str | os.PathLike, like) -> dict[str, Any]:
    """Parameters from a safetensors file as the nested dict `like` (arrays or shapes) wants, in its dtypes, on the device.

    Tensors are read one by one, so the host never holds the file as a whole.

    Raises:
        UserError: no such file, damaged, or its parameters are not those of `like`.
    """
    if not os.path.isfile(path):
        raise UserError(f"There is no parameter file {path}; train it, or give another path.")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wanted = tree.flatten(like)
            _check_fit(path, found, {name: tuple(leaf.shape) for name, leaf in wanted.items()})
            # astype before jnp.asarray: what goes to the device is what stays there
            return tree.unflatten(
                {
                    name: jnp.asarray(file.get_tensor(name).astype(leaf.dtype, copy=False))
                    for name, leaf in wanted.items()
                }
            )
    except (SafetensorError, ValueError) as error:
        raise UserError(f"The parameter file {path} is damaged ({error}); copy or train it again.") from error


def _check_fit(path, found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """UserError where a file's names or shapes are not those that a network wants."""
    for what, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has unknown", found.keys() - wanted.keys()),
    ):
        if names:
            raise UserError(
                f"{path} {what} {len(names)} parameters, such as {min(names)}: it is not of this network; "
                "give the config it was trained with."
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(
                f"{path}: {name} is {list(found[name])}, but this network needs {list(shape)}; "
                "give the config it was trained with."
            )


def _kind(leaf) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"

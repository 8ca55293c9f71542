"""What a run keeps on disk: training states for resuming (orbax), bare parameters for use (safetensors), its config.

A training checkpoint holds the state, the data iterator's position, and a description of the state, by which
one of another stage or size is told from a damaged one. It is written while training goes on, by all processes, each
its own parts; whatever there is gets its name only when complete.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from orbax.checkpoint import checkpoint_managers
from safetensors import SafetensorError

from rfjax import distributed, files, tensorfile, tree
from rfjax.errors import FULL, UserError

# Fields of a config that a run may change on its way; all others make it another run.
FREE = ("steps", "save_every", "log_every", "keep", "best", "max_skipped", "mesh", "accumulate")


class Restored(NamedTuple):
    """A training checkpoint that was read back."""

    step: int
    state: Any
    data: Any  # the data iterator's get_state()


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Not asked here: jax wants steps in order, and orbax asks from a thread, for steps gone by (distributed.stop_signal)."""
        return False


class Checkpoints:
    """The newest `keep` training checkpoints of one run, under `folder`, each named by the steps done, and the best one.

    A context: on leaving, what is being written is waited for.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, stage: str, best: str = ""):
        self.folder, self.stage, self.metric = Path(folder).absolute(), stage, best
        self._best = self.folder.parent / "best.json"
        newest = checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, self]),
            cleanup_tmp_directories=True,  # what a killed process left half written
        )
        self._manager = _Manager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, where) -> None:
        lost = kind is not None and not issubclass(kind, UserError) and jax.process_count() > 1
        if not lost:  # else the others, with whom a checkpoint is completed, may be no more
            with _disk(self.folder):
                self._manager.close()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """orbax's question: which checkpoints stay. The best does."""
        del context
        best = self.best()["step"] if self.metric else None
        return [found.step == best for found in checkpoints]

    def best(self) -> dict[str, Any]:
        """{"step", "metric", "value"} of the best checkpoint so far; its step is None before there is one."""
        found = json.loads(self._best.read_text()) if self._best.exists() else {}
        return found if found.get("metric") == self.metric else {"step": None, "value": -float("inf")}

    def better(self, values: Mapping[str, float]) -> bool:
        """Whether these are of the best checkpoint so far, in every process as process 0 has it; all must ask."""
        mine = bool(self.metric) and values[self.metric] > self.best()["value"]
        return distributed.agree(mine or not distributed.is_main())

    def note_best(self, step: int, values: Mapping[str, float]) -> None:
        """Notes the checkpoint of `step` as the best; process 0 asks."""
        _write_json(self._best, {"step": step, "metric": self.metric, "value": values[self.metric]})

    def save(self, step: int, state, data) -> None:
        """Keeps a state after `step` steps; `data` is the iterator's get_state(), anything JSON takes.

        Comes back as soon as the state may change: files are written meanwhile, once the save before is done.
        """
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave({"position": data}),
            "about": ocp.args.JsonSave({"stage": self.stage, "leaves": describe(state)}),
        }
        with _disk(self.folder):
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():  # a damaged one that the run has come to again
                self._manager.delete(step)
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like) -> Restored | None:
        """The newest readable checkpoint, in the shapes, dtypes and shardings of `like`; None without one.

        Raises:
            UserError: the checkpoint is of another stage or of other sizes, or all are damaged.
        """
        self._manager.wait_until_finished()

        def read(folder):
            self._check(_read_json(folder / "about"), like)
            return Restored(int(folder.name), _read(folder, like), _read_json(folder / "data")["position"])

        return _newest(self.folder, self._manager.all_steps(), read)

    def _check(self, about, like) -> None:
        if about["stage"] != self.stage:
            raise UserError(
                f"{self.folder.parent} holds a run of stage {about['stage']!r}, not {self.stage!r}; "
                "use another --workdir."
            )
        here, there = describe(like), about["leaves"]
        differing = sorted(name for name in here | there if here.get(name) != there.get(name))
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.folder.parent} holds a run of other sizes or another optimiser: there, {name} is "
                f"{there.get(name, 'missing')}, by this config {here.get(name, 'missing')}; "
                "use another --workdir."
            )


@contextlib.contextmanager
def _disk(folder: Path):
    """Around what writes checkpoints: a full disk is an OSError, as it is elsewhere, whatever orbax makes of it."""
    try:
        yield
    except Exception as error:
        for number in FULL:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def _newest(folder: Path, steps, read):
    """read(folder of a checkpoint) of the newest step that every process can read; None where there are no steps."""
    for step in sorted(steps, reverse=True):
        refused, damage, found = None, "in another process", None
        try:
            found = read(folder / str(step))
        except (UserError, MemoryError, PermissionError) as error:
            refused = error
        except Exception as error:  # what a damaged file makes orbax raise is not one type
            damage = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.200}"
            refused = (
                error if "RESOURCE_EXHAUSTED" in str(error) or "Too many open files" in str(error) else None
            )
        if distributed.agree(found is not None):
            return found
        if refused:
            raise refused
        distributed.tell(f"The checkpoint of step {step} is damaged ({damage}); trying an older one.")
    if steps:
        raise UserError(
            f"All checkpoints in {folder} are damaged, the oldest by {damage}; copy them again, or take another --workdir."
        )
    return None


def _read(folder: Path, like):
    """Leaves of a checkpoint's state, by their paths in `like`, which may be fewer, in its dtypes and shardings.

    No process waits for another. ValueError where one is missing.
    """
    arguments = ocp.args.PyTreeRestore(
        item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
    )
    found = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=arguments)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{_name(path)} is missing")
    return found


def _read_json(folder: Path):
    return ocp.JsonCheckpointHandler().restore(folder)


def _write_json(path: Path, content) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def make(workdir: Path) -> None:
    """Makes the run's folder. UserError where a file is, or for a bucket; OSError where it cannot be made."""
    files.refuse_bucket(workdir)
    if workdir.is_file():
        raise UserError(f"{workdir} is a file; give --workdir a folder.")
    workdir.mkdir(parents=True, exist_ok=True)


def remember(config, workdir: Path) -> None:
    """Writes the config to the run's config.json.

    Raises:
      UserError: it holds a run whose config differs in more than FREE fields, or not all processes see it.
      OSError: it cannot be written.
    """
    path, fields = workdir / "config.json", json.loads(config.to_json_best_effort())
    saved = bool(_steps(workdir)[1])  # of a run that saved nothing there is nothing to go on with
    if path.exists() and saved:
        _refuse_other(workdir, _flat(json.loads(path.read_text())), _flat(fields))
    if distributed.is_main():
        if not saved:
            (workdir / "best.json").unlink(missing_ok=True)
        _write_json(path, fields)
    if not distributed.seen(path):
        raise UserError(f"Not every process sees {workdir}; give a --workdir that all machines share.")


def remember_contents(contents: Mapping[str, str], workdir: Path) -> None:
    """Notes in the run's contents.json what tells the files that it reads at every start: {path: fingerprint}.

    UserError where one is another than the run began with, which would change it unseen.
    """
    path = workdir / "contents.json"
    before = json.loads(path.read_text()) if path.exists() and _steps(workdir)[1] else {}
    for name in contents:
        if before.get(name, contents[name]) != contents[name]:
            raise UserError(
                f"{name} is another than {workdir} began with; put the old one back, or use another --workdir."
            )
    distributed.agree(True)  # now all have looked
    if distributed.is_main() and contents:
        _write_json(path, before | contents)


def _refuse_other(workdir: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name in sorted(there | here):
        one, other = (fields.get(name, "missing") for fields in (there, here))
        if one != other and name.split(".")[0] not in FREE:
            raise UserError(
                f"{workdir} holds a run with config.{name} = {one!r}, not {other!r}; use another --workdir, or set it as it was."
            )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"dit": {"dim": 8}} → {"dit.dim": 8}."""
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def describe(state) -> dict[str, str]:
    """{path: "float32[3, 4]"} of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def save_params(path: str | os.PathLike, params: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays to one safetensors file, names "/"-joined, layer by layer, by process 0.

    Arrays that are spread over processes are gathered, so all processes must call it.
    """
    flat = {name: (leaf, distributed.pieces(leaf)) for name, leaf in tree.flatten(params).items()}
    if distributed.is_main():
        entries = [
            tensorfile.Entry(name, tensorfile.Kind(tuple(leaf.shape), np.dtype(leaf.dtype)), reads)
            for name, (leaf, reads) in flat.items()
        ]
        tensorfile.write(path, entries)
    else:
        for _, reads in flat.values():
            for read in reads:
                read()


def load_params(path: str | os.PathLike, like) -> dict[str, Any]:
    """Parameters as the nested dict `like` (arrays or shapes) wants, in its dtypes, on the device.

    Where a leaf of `like` has a sharding, the tensor goes straight to its places, and only the slices that this process
    needs are read. Tensors are read one by one, so the host never holds the file as a whole.

    Args:
      path: a safetensors file, or the folder of a run: the averaged parameters of its newest checkpoint.

    Raises:
        UserError: nothing there, damaged, or its parameters are not those of `like`.
    """
    if os.path.isdir(path):
        return _averages(Path(path), like)
    if not os.path.isfile(path):
        raise UserError(
            f"There is no parameter file {path}; give another path, or make it (docs/small_world.md and docs/training.md say how)."
        )
    try:
        with safetensors.safe_open(path, "numpy") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wanted = tree.flatten(like)
            _check_fit(path, found, {name: tuple(leaf.shape) for name, leaf in wanted.items()})
            return tree.unflatten({name: _load(file, name, leaf) for name, leaf in wanted.items()})
    except (SafetensorError, ValueError) as error:
        raise UserError(f"The parameter file {path} is damaged ({error}); copy or train it again.") from error


def _load(file, name: str, like) -> jax.Array:
    """One tensor of an open file, as `like`."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = file.get_slice(name)[index] if index else file.get_tensor(name)
        return part.astype(like.dtype, copy=False)  # here: what goes to the device is what stays there

    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(read(()))
    return jax.make_array_from_callback(tuple(like.shape), sharding, read)


def newest(path: str | os.PathLike) -> Path:
    """What `load_params` reads first: a file, or of a run's folder its newest checkpoint."""
    folder, steps = _steps(Path(path))
    return folder / str(max(steps)) if steps else Path(path)


def _steps(run: Path) -> tuple[Path, list[int]]:
    """The folder of a run's checkpoints, and their steps."""
    folder = run / "checkpoints"
    return folder, ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def _averages(run: Path, like) -> dict[str, Any]:
    """The averaged parameters, of the generator where there are two networks, of a run's newest readable checkpoint."""
    folder, steps = _steps(run)
    if not steps:
        raise UserError(
            f"There are no checkpoints in {run}; give the folder of a run, or a .safetensors file."
        )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for name, leaf in tree.flatten(like).items()
    }

    def read(checkpoint: Path):
        leaves = _read_json(checkpoint / "about")["leaves"]
        above = "generator/ema/" if any(name.startswith("generator/ema/") for name in leaves) else "ema/"
        kinds = {name.removeprefix(above): kind for name, kind in leaves.items() if name.startswith(above)}
        found = {name: tuple(json.loads(kind[kind.index("[") :])) for name, kind in kinds.items()}
        _check_fit(checkpoint, found, {name: leaf.shape for name, leaf in wanted.items()})
        if "latent_std" in wanted:
            raise UserError(
                f"The checkpoints in {run} lack the latents' statistics, which are measured at a save; give {run}/vae.safetensors."
            )
        nested = tree.unflatten({above + name: leaf for name, leaf in wanted.items()})
        flat = tree.flatten(_read(checkpoint, nested))
        return tree.unflatten({name.removeprefix(above): leaf for name, leaf in flat.items()})

    with jax.ensure_compile_time_eval():  # also while a stage's init is traced
        return _newest(folder, steps, read)


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
                "give the config it was trained with (of a teacher, its sizes in config.teacher_dit)."
            )

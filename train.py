"""Train one stage of a model: `python train.py --config configs/shapes_vae.py --workdir runs/vae`.

A field of the config is changed by `--config.steps=100`. Started again with the same workdir, a run goes on
from its last checkpoint, on CPU bit for bit. Ctrl-C or SIGTERM saves a checkpoint first. On GPUs, and on several machines:
docs/running.md.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from rfjax import checkpoint, compilation, data, distributed, errors, files, metrics, sharding
from rfjax.config import build, check, parse_flags, read_by
from rfjax.errors import UserError
from rfjax.stages import STAGES, Stage, latent, sources
from rfjax.state import skips

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, parameters, metrics, samples."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "This is one of several processes: find the others from the environment, as on a TPU pod.",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.")
PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")


OWN = ("seed", "steps", "save_every", "log_every", "keep")  # what the loop itself reads of a config


class Run(NamedTuple):
    """What a config says, read and checked."""

    stage: Stage
    mesh: Mesh
    batches: Any  # iterator over this process's rows
    update: Callable
    export: Callable
    sample: Callable
    evaluate: Callable


def train(config, workdir: Path) -> None:
    """Runs or goes on with the stage that the config names, until config.steps or a signal.

    UserError before work starts, and before anything is in workdir, for a field that the stage needs and the config lacks, or
    that makes no sense.
    """
    if config.get("stage") not in STAGES:
        raise UserError(f"config.stage must be one of {', '.join(STAGES)}, not {config.get('stage')!r}.")
    with read_by(f"stage {config.stage!r}", config):
        check(config)
        mesh = sharding.make_mesh(build(sharding.MeshConfig, config, "mesh"))
        with jax.set_mesh(mesh):
            loop(config, prepare(config, mesh), workdir)


def prepare(config, mesh) -> Run:
    """Reads all of the config. What an update reads shows when it is traced, which is done once and serves the first step."""
    stage = STAGES[config.stage]
    _ = [config[name] for name in OWN]
    sharding.check(config, mesh)
    if config.get("best") and config.best not in (measured := stage.measures(config)):
        raise UserError(
            f"config.best is {config.best!r}, which stage {config.stage!r} does not measure; it measures "
            f"{', '.join(measured) or 'nothing: leave it empty'}."
        )
    dataset = data.share(stage.data, config, *sharding.batch_parts(mesh))
    functions = (part(config) for part in (stage.update, stage.export, stage.sample, stage.evaluate))
    run = Run(stage, mesh, data.iterate(dataset), *functions)
    fixed = sharding.placed(sources.shapes(stage.frozen(config)), mesh)
    batch = sharding.put_batch(dataset[0], mesh)
    jax.eval_shape(lambda *args: run.update(*args, config.steps), shapes(config, stage, mesh), fixed, batch)
    return run


def loop(config, run: Run, workdir: Path) -> None:
    """Trains and reports, from the newest checkpoint on."""
    mesh, batches = run.mesh, run.batches
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            checkpoint.make(workdir)
            stack.enter_context(files.locked(workdir, "use another --workdir"))
        checkpoint.remember(config, workdir)
        kept = stack.enter_context(
            checkpoint.Checkpoints(workdir / "checkpoints", config.keep, config.stage, config.get("best", ""))
        )
        fixed_files = sources.contents(run.stage.frozen(config)) | sources.records(config)
        checkpoint.remember_contents(fixed_files, workdir)
        state, start = begin(config, run.stage, mesh, kept, batches)
        fixed = sources.load(run.stage.frozen(config), jax.random.key(config.seed), mesh)
        stop, report = distributed.stop_signal(), make_report(config, run, fixed, workdir, kept)
        log, recent, stopped = metrics.Log(workdir, start + 1), [], False
        if start >= config.steps:  # done before, perhaps stopped before the parameters were written
            distributed.tell(
                f"{config.stage}: step {start} of {config.steps} is done; {workdir}/ gets its results again"
            )
            report(log, state, start)
        else:
            if start and start % config.save_every == 0 and not log.has(start, run.stage.measures(config)):
                report(log, state, start)  # stopped between this save and what it tells
            distributed.tell(
                f"{config.stage}: steps {start} to {config.steps}; everything goes to {workdir}/; the first step compiles"
            )
        for step in (bar := metrics.progress(start, config.steps)):
            state, values = run.update(state, fixed, sharding.put_batch(next(batches), mesh), step)
            jax.block_until_ready(recent[-1:])  # one step ahead of the device, so that a signal is soon seen
            recent.append(values)
            done, stopping = step + 1, stop(step + 1)  # asked once: a signal may come at any line
            saves = done % config.save_every == 0 or done == config.steps or stopping
            if done % config.log_every == 0 or saves:
                row, skipped = skips(state)
                means = metrics.means(recent) | {"skipped": skipped}
                log.scalars(done, means | {"steps_per_second": bar.format_dict["rate"] or 0.0})
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
                if row >= config.get("max_skipped", 10):
                    raise UserError(
                        f"The gradient was not finite in the last {row} updates until step {done}: begin in another --workdir "
                        f"with a lower learning rate; the last good checkpoint is kept in {workdir}/checkpoints."
                    )
                recent = []
            if saves:
                kept.save(done, state, batches.get_state())
            if stopping and done < config.steps:
                stopped = True
                break
            if saves:
                report(log, state, done)
    log.close()
    if stopped:
        distributed.tell(
            f"Stopped and saved after step {done}; run the same command to go on, with --config.steps={done} to end there "
            "and have its parameters."
        )


def shapes(config, stage, mesh):
    """The state's shapes in their places."""
    params = sources.shapes(stage.networks(config))
    return sharding.placed(jax.eval_shape(functools.partial(stage.init, config), params), mesh)


def begin(config, stage, mesh, kept, batches):
    """(state, steps done): the newest checkpoint with the data where it was, or else a fresh state."""
    like = shapes(config, stage, mesh)
    found = kept.restore(like)
    if found is None:
        params = sources.load(stage.networks(config), jax.random.key(config.seed), mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, like)
        init = functools.partial(stage.init, config)
        with warnings.catch_warnings():  # the VAE's statistics are replaced, and become nothing
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return jax.jit(init, out_shardings=places, donate_argnums=0)(params), 0
    batches.set_state(found.data)
    return found.state, found.step


def make_report(config, run: Run, fixed, workdir, kept):
    """f(log, state, step): writes the parameters and sample clips, measures, and prints what is where."""
    fps = latent.video(config).fps

    def report(log, state, step):
        save(run.export(state, fixed), workdir)
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        log.clips(step, *run.sample(state, fixed, key), fps)
        values = run.evaluate(state, fixed)
        if kept.better(values):
            save(
                run.export(state, fixed), workdir / "best"
            )  # anew: it may be large, and is not kept while clips are made
            if distributed.is_main():
                kept.note_best(step, values)
        log.scalars(step, values)  # the last: a run that goes on asks whether it is there
        told = ", ".join([f"{name} {value:.4g}" for name, value in values.items()] or ["nothing judged"])
        distributed.tell(f"step {step}: {told}; parameters and samples are in {workdir}/")

    return report


def save(exported, folder: Path) -> None:
    """Writes {name: parameters}, each to a file of its own."""
    for name, params in exported.items():
        checkpoint.save_params(folder / f"{name}.safetensors", params)


def main(_) -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError(
            "Give --config FILE and --workdir FOLDER, such as --config configs/shapes_debug.py --workdir runs/debug."
        )
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)  # orbax tells every step of every save
    joins = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if DISTRIBUTED.value or any(given is not None for given in joins) or distributed.detected():
        distributed.start(*joins)
    with distributed.together():
        train(config, workdir)


if __name__ == "__main__":
    errors.exit_cleanly(app.run)(main, flags_parser=parse_flags)

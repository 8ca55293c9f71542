"""Train one stage of a model: `python train.py --config configs/shapes_vae.py --workdir runs/vae`.

A field of the config is changed by `--config.steps=100`. Started again with the same workdir, a run goes on
bit for bit from its last checkpoint. Ctrl-C or SIGTERM saves a checkpoint first. On several machines start it on each:
docs/running.md.
"""

import functools
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rfjax import checkpoint, compilation, data, distributed, errors, metrics, sharding
from rfjax.config import build, parse_flags
from rfjax.errors import UserError
from rfjax.stages import STAGES, sources
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


def train(config, workdir: Path) -> None:
    """Runs or goes on with the stage that the config names, until config.steps or a signal."""
    stage = STAGES[config.stage]
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config, "mesh"))
    sharding.check(config, mesh)
    batches = data.iterate(data.share(stage.data, config, *sharding.batch_parts(mesh)))
    checkpoint.remember(config, workdir)
    kept = checkpoint.Checkpoints(workdir / "checkpoints", config.keep, config.stage, config.get("best", ""))
    with jax.set_mesh(mesh), kept:
        state, start = begin(config, stage, mesh, kept, batches)
        fixed = sources.load(stage.frozen(config), jax.random.key(config.seed), mesh)
        update, stop = stage.update(config), distributed.stop_signal()
        report = make_report(config, stage, fixed, workdir, kept)
        log, recent, stopped = metrics.Log(workdir, start + 1), [], False
        if start >= config.steps:  # done before, perhaps stopped before the parameters were written
            report(log, state, start)
        distributed.tell(
            f"{config.stage}: steps {start} to {config.steps}; everything goes to {workdir}/; the first step compiles"
        )
        for step in (bar := metrics.progress(start, config.steps)):
            state, values = update(state, fixed, sharding.put_batch(next(batches), mesh), step)
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
                        f"The gradient was not finite in the last {row} updates until step {done}: lower the learning "
                        f"rate and start again; the last good checkpoint is kept in {workdir}/checkpoints."
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
        distributed.tell(f"Stopped and saved after step {done}; run the same command to go on.")


def begin(config, stage, mesh, kept, batches):
    """(state, steps done): the newest checkpoint with the data where it was, or else a fresh state."""
    networks, init = stage.networks(config), functools.partial(stage.init, config)
    shapes = jax.eval_shape(init, sources.shapes(networks))
    places = sharding.place(shapes, mesh)
    like = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )
    found = kept.restore(like)
    if found is None:
        params = sources.load(networks, jax.random.key(config.seed), mesh)
        return jax.jit(init, out_shardings=places)(params), 0
    batches.set_state(found.data)
    return found.state, found.step


def make_report(config, stage, fixed, workdir, kept):
    """f(log, state, step): writes the parameters and sample clips, measures, and prints what is where."""
    export, sample, evaluate = stage.export(config), stage.sample(config), stage.evaluate(config)

    def report(log, state, step):
        for name, params in export(state, fixed).items():
            checkpoint.save_params(workdir / f"{name}.safetensors", params)
        log.clips(
            step,
            *sample(state, fixed, jax.random.fold_in(jax.random.key(config.seed), step)),
            config.video.fps,
        )
        values = evaluate(state, fixed)
        log.scalars(step, values)
        told = ", ".join([f"{name} {value:.4g}" for name, value in values.items()] or ["nothing judged"])
        distributed.tell(f"step {step}: {told}; parameters and samples are in {workdir}/")
        kept.judge(step, values)

    return report


def main(_) -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError(
            "Give --config FILE and --workdir FOLDER, such as --config configs/shapes_debug.py --workdir runs/debug."
        )
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    if config.get("stage") not in STAGES:
        raise UserError(f"config.stage must be one of {', '.join(STAGES)}, not {config.get('stage')!r}.")
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)  # orbax tells every step of every save
    joins = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if DISTRIBUTED.value or any(given is not None for given in joins) or distributed.detected():
        distributed.start(*joins)
    with distributed.together():
        train(config, workdir)


if __name__ == "__main__":
    errors.exit_cleanly(app.run)(main, flags_parser=parse_flags)

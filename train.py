"""Train one stage of a model: `python train.py --config configs/shapes_vae.py --workdir runs/vae`.

A field of the config is changed by `--config.steps=100`. Started again with the same workdir, a run goes on
bit for bit from its last checkpoint. Ctrl-C or SIGTERM saves a checkpoint first.
"""

import functools
import math
import re
import signal
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from rfjax import checkpoint, compilation, data, errors, metrics, sharding
from rfjax.config import build, load
from rfjax.errors import UserError
from rfjax.stages import STAGES, sources

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, parameters, metrics, samples."
)


def train(config, workdir: Path) -> None:
    """Runs or goes on with the stage that the config names, until config.steps or a signal."""
    stage = STAGES[config.stage]
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config, "mesh"))
    batches = data.iterate(stage.data(config))
    workdir.mkdir(parents=True, exist_ok=True)
    kept = checkpoint.Checkpoints(workdir / "checkpoints", config.keep, config.stage)
    state, start = begin(config, stage, mesh, kept, batches)
    fixed = sources.load(stage.frozen(config), jax.random.key(config.seed), mesh)
    update, stop = stage.update(config), stop_signal()
    report = make_report(config, stage, workdir, kept)
    log, recent = metrics.Log(workdir, start + 1), []
    if start >= config.steps:  # done before, perhaps stopped before the parameters were written
        report(log, state, start)
    print(f"{config.stage}: steps {start} to {config.steps}; everything goes to {workdir}/")
    with tqdm(range(start, config.steps), initial=start, total=config.steps, dynamic_ncols=True) as bar:
        for step in bar:
            state, values = update(state, fixed, sharding.put_batch(next(batches), mesh), step)
            jax.block_until_ready(recent[-1:])  # one step ahead of the device, so that a signal is soon seen
            recent.append(values)
            done, stopping = step + 1, stop()  # asked once: a signal may come at any line
            saves = done % config.save_every == 0 or done == config.steps or stopping
            if done % config.log_every == 0 or saves:
                means = finite_means(recent, done, workdir)
                rate = bar.format_dict["rate"] or 0.0
                log.scalars(done, means | {"steps_per_second": rate})
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
                recent = []
            if saves:
                kept.save(done, state, batches.get_state())
            if stopping and done < config.steps:
                tqdm.write(f"Stopped and saved after step {done}; run the same command to go on.")
                break
            if saves:
                report(log, state, done)
    log.close()


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


def make_report(config, stage, workdir, kept):
    """f(log, state, step): writes the parameters and sample clips, measures, and prints what is where."""
    export, sample, evaluate = stage.export(config), stage.sample(config), stage.evaluate(config)

    def report(log, state, step):
        for name, params in export(state).items():
            checkpoint.save_params(workdir / f"{name}.safetensors", params)
        log.clips(
            step, *sample(state, jax.random.fold_in(jax.random.key(config.seed), step)), config.world.fps
        )
        values = evaluate(state)
        log.scalars(step, values)
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"step {step}: {told}; parameters and samples are in {workdir}/")

    return report


def finite_means(recent, step, workdir) -> dict[str, float]:
    """Mean of each metric over the last steps; UserError when any is not finite."""
    recent = jax.device_get(recent)
    means = {name: float(np.mean([values[name] for values in recent])) for name in recent[0]}
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise UserError(
            f"{broken[0]} is not finite at step {step}: lower the learning rate and start again; "
            f"the last good checkpoint is kept in {workdir}/checkpoints."
        )
    return means


def stop_signal():
    """() → whether SIGTERM or Ctrl-C has come; a second one ends the program at once."""
    seen = []

    def remember(number, _):
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return lambda: bool(seen)


def parse(argv):
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
        raise UserError(f"A flag is wrong: {said}") from error


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
    train(config, workdir)


if __name__ == "__main__":
    errors.exit_cleanly(app.run)(main, flags_parser=parse)

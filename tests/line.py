"""Training at its smallest, for what surrounds it: `python tests/line.py --config tests/line.py --workdir …` is train.py with
a stage `line`, y = x (W + V) by least squares with noise on x. $PAUSE is the seconds that a step lasts.
"""

import os
import time

import conftest  # noqa: F401  strict JAX
import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import train
from rfjax import errors, metrics, state
from rfjax.config import build, parse_flags
from rfjax.stages import STAGES, Stage, sources

LAYERS, INPUTS, OUTPUTS = 2, 8, 3


def get_config(variant: str = "") -> ConfigDict:
    """The run; `:split` has its parameters split over two devices."""
    return ConfigDict(
        {
            "stage": "line",
            "steps": 12,
            "batch_size": 8,
            "seed": 0,
            "save_every": 4,
            "log_every": 1,
            "keep": 3,
            "best": "",
            "max_skipped": 3,
            "accumulate": 1,
            "init_from": "",
            "broken": (0, 0),  # steps from, to whose batches are infinite
            "mesh": {"data": -1, "fsdp": 2 if variant else 1, "context": 1},
            "video": {"height": 16, "width": 16, "fps": 16},
            "optimizer": {"learning_rate": 0.1, "warmup": 3},
        }
    )


def networks(config):
    def random(key):
        kernel = jax.random.normal(key, (LAYERS, INPUTS, OUTPUTS))
        return {"layer": {"kernel": kernel, "bias": jnp.zeros(OUTPUTS)}}

    return {"line": sources.Source(random, config.init_from)}


def init(config, params):
    return state.create(params["line"], _optimizer(config)[0])


def data(config):
    def element(index):
        x = np.random.default_rng((config.seed, index)).normal(size=INPUTS).astype(np.float32)
        return {"x": x, "y": np.cumsum(x)[:OUTPUTS]}

    return grain.MapDataset.range(2**40).map(element).batch(config.batch_size)


def update(config):
    optimizer, options = _optimizer(config)
    first, end = config.broken

    @jax.jit
    def step_once(now, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        x = jnp.where((first <= step) & (step < end), jnp.inf, x)

        def loss(params, batch, index):
            out = batch["x"] @ params["layer"]["kernel"].sum(0) + params["layer"]["bias"][None]
            error = jnp.square(out - batch["y"]).mean()
            return error, {"loss": error}

        return state.descend(now, loss, batch | {"x": x}, optimizer, options, config.accumulate)

    def slow(now, fixed, batch, step):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return step_once(now, batch, step)

    return slow


def export(config):
    return lambda now, fixed: {"line": now.ema}


def sample(config):
    """A still clip of the kernel."""
    show = jax.jit(lambda kernel: jnp.tile(kernel.sum(0)[None, None, :, :2, None], (1, 4, 2, 8, 3)))
    return lambda now, fixed, key: (metrics.to_uint8(show(now.ema["layer"]["kernel"])), ["the kernel"])


def evaluate(config):
    """Bigger in the middle of the run than at its ends."""
    return lambda now, fixed: {"middle": -abs(float(now.step) - config.steps / 2)}


def _optimizer(config):
    options = build(state.OptimizerConfig, config, "optimizer")
    return state.make_optimizer(options, config.steps), options


def measured(config):
    return ["middle"]


STAGES["line"] = Stage(networks, lambda config: {}, init, data, update, export, sample, evaluate, measured)

if __name__ == "__main__":
    errors.exit_cleanly(train.app.run)(train.main, flags_parser=parse_flags)

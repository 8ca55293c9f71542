"""A transformer small enough to compile in a blink, with random weights everywhere, and its inputs."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np

from rfjax import dit, rollout

CONFIG = dit.DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=6, text_len=5, in_dim=3, freq_dim=8
)
FRAME = (4, 6, 3)  # height, width, channels of a latent frame


@functools.cache
def params(config=CONFIG):
    """Random parameters, everywhere: at initialisation the head is 0 and says nothing."""
    shapes = jax.eval_shape(functools.partial(dit.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.float32(0.25 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def context(batch, config=CONFIG):
    return normal(7, batch, config.text_len, config.text_dim)


def model(config, batch=1):
    """The rollout model of a RolloutConfig, on the context of `batch` clips."""
    return rollout.Model(dit.DiT(CONFIG), params(), text_kv(CONFIG, batch), config)


@functools.cache
def text_kv(config, batch):
    call = jax.jit(functools.partial(dit.DiT(config).apply, method="text_kv"))
    return call({"params": params(config)}, jnp.asarray(context(batch, config)))


def naive_dit(batch=1, config=CONFIG):
    return naive.DiT(config, params(config), context(batch, config))

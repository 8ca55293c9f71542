"""Stage `vae`: train the video VAE on clips of the small world, and measure its latents' statistics.

Loss = mean |e| + square · mean e² + edge · mean |∇e| + kl · KL(q(z|x) ‖ N(0, 1)), e = x̂ - x, z ~ q(z|x)
(arXiv 1312.6114), video in [-1, 1]. The square pulls on what is badly wrong, the gradient makes edges crisp.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rfjax import data as pipelines
from rfjax import metrics
from rfjax import state as train
from rfjax.config import build
from rfjax.shapes import World
from rfjax.stages import clips
from rfjax.stages.sources import Source
from rfjax.vae import VAE, VAEConfig

CLIPS = 64  # over which the latents' statistics are taken
EVALUATED_FRAMES = 21
INITIAL_LOGVAR = -6.0


def networks(config):
    """{"vae": the parameters in config.init_from, or from nothing}."""
    vae = _network(config)
    video = jnp.zeros((1, config.frames, config.world.size, config.world.size, 3))

    def random(key):
        params = vae.init(key, video)["params"]
        # Latents begin almost free of noise: from a variance of 1 it takes many steps to be rid of it.
        bias = params["conv1"]["bias"]
        params["conv1"]["bias"] = bias.at[vae.config.z_dim :].set(INITIAL_LOGVAR)
        return params

    return {"vae": Source(random, config.init_from)}


def frozen(config):
    """Nothing."""
    del config
    return {}


def init(config, params):
    """TrainState of params["vae"], without the latents' statistics that a file may hold: they are measured at the end."""
    z = _network(config).config.z_dim
    fresh = params["vae"] | {"latent_mean": jnp.zeros(z), "latent_std": jnp.ones(z)}
    return train.create(fresh, _optimizer(config)[0])


def data(config):
    """Batches {"video": uint8 [B, F, H, W, 3]}."""
    return _clips(config, config.frames, config.batch_size, "train").map(
        lambda batch: {"video": batch["video"]}
    )


def update(config):
    """f(state, {}, batch, step) → (state, metrics)."""
    vae, (optimizer, options) = _network(config), _optimizer(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def step_once(state, fixed, batch, step):
        del fixed
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        weights = {"square": config.square, "edge": config.edge, "kl": config.kl}

        def objective(params, batch, index):
            return loss(vae, params, to_float(batch["video"]), jax.random.fold_in(key, index), weights)

        return train.descend(state, objective, batch, optimizer, options, config.accumulate)

    return step_once


def loss(vae: VAE, params, video, key, weights):
    """video [B, F, H, W, 3] → (loss, metrics); weights beside that of mean |e|: {"square", "edge", "kl"}."""
    variables = {"params": params}
    mean, logvar = vae.apply(variables, video, method="encode")
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    out = vae.apply(variables, latents, method="decode")
    error = out - video
    parts = {
        "square": jnp.square(error).mean(),
        "edge": sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3)),
        "kl": 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean(),
    }
    l1 = jnp.abs(error).mean()
    total = l1 + sum(weights[name] * part for name, part in parts.items())
    return total, {"loss": total, "l1": l1, "psnr": psnr(out, video)} | parts


def psnr(out, video):
    """Peak signal-to-noise ratio in dB, one number, of a whole video to another, both [B, F, H, W, 3] in [-1, 1]."""
    return -10 * jnp.log10(((jnp.clip(out, -1, 1) - video) ** 2).mean() / 4)


def export(config):
    """f(state, {}) → {"vae": averaged parameters with their latents' statistics}."""
    measure = latent_statistics(config)

    def exported(state, fixed):
        del fixed
        mean, std = measure(state.ema)
        return {"vae": state.ema | {"latent_mean": mean, "latent_std": std}}

    return exported


def latent_statistics(config):
    """f(params) → mean and standard deviation of each latent channel, both [z], over CLIPS training clips."""
    vae = _network(config)

    @jax.jit
    def encode(params, batch):
        return vae.apply({"params": params}, to_float(batch["video"]), method="encode")[0]

    batches = _clips(config, config.frames, config.batch_size, "train")

    def measure(params):
        here, count = functools.partial(encode, params), -(-CLIPS // config.batch_size)
        latents = [clips.in_groups(config, here, {"video": batches[i]["video"]}) for i in range(count)]
        channels = np.concatenate([part.reshape(-1, part.shape[-1]) for part in latents])
        return channels.mean(0), channels.std(0)

    return measure


def sample(config):
    """f(state, {}, key) → held-out clips, original | reconstruction [N, F, H, 2 W, 3], and their captions."""
    reconstruct, held_out = _reconstruct(config), _clips(config, EVALUATED_FRAMES, clips.SHOWN, "held_out")[0]

    def samples(state, fixed, key):
        del fixed, key
        out = metrics.to_uint8(reconstruct(state.ema, held_out["video"]))
        return np.concatenate([held_out["video"], out], 3), list(held_out["caption"])

    return samples


def evaluate(config):
    """f(state, {}) → {"held_out_psnr": dB} of the averaged parameters over clips that training never shows."""
    reconstruct, held_out = (
        _reconstruct(config),
        _clips(config, EVALUATED_FRAMES, clips.SHOWN, "held_out")[1]["video"],
    )
    return lambda state, fixed: {
        "held_out_psnr": float(psnr(reconstruct(state.ema, held_out), to_float(held_out)))
    }


def measured(config) -> list[str]:
    """The name that `evaluate` gives."""
    del config
    return ["held_out_psnr"]


def to_float(video):
    """uint8 [B, F, H, W, 3] → float32 in [-1, 1], same shape."""
    return jnp.asarray(video).astype(jnp.float32) / 127.5 - 1


def _reconstruct(config):
    """f(params, video uint8 [N, F, H, W, 3]) → float32 in [-1, 1] of the same shape, on the host of every process."""
    vae = _network(config)

    @jax.jit
    def reconstruct(params, batch):
        return vae.apply({"params": params}, to_float(batch["video"]))[0]

    return lambda params, video: clips.in_groups(
        config, functools.partial(reconstruct, params), {"video": video}
    )


def _network(config) -> VAE:
    return VAE(build(VAEConfig, config, "vae"))


def _optimizer(config):
    options = build(train.OptimizerConfig, config, "optimizer")
    return train.make_optimizer(options, config.steps), options


def _clips(config, frames, batch_size, split):
    return pipelines.clips(frames, batch_size, config.seed, build(World, config, "world"), split)

"""Stage `teacher`: the bidirectional transformer, by flow matching on clips of latents (arXiv 2210.02747, 2503.20314).

Noise levels are from the shifted training table, one a clip, all of equal weight. In half of the clips the first blocks are
clean, and the clip goes on from them: where all frames are as noisy, each is read by itself, and only clear ones beside noisy
ones teach attention to look along time. In a tenth of the clips the negative prompt stands for the caption, for guidance.
"""

import jax
import jax.numpy as jnp

from rfjax import axes, compilation, losses, teacher
from rfjax import state as train
from rfjax.stages import clips, latent, student

DROPPED = 0.1  # share of clips that learn with the negative prompt in place of their caption
CONTINUED = 0.5  # share of clips whose first blocks are clean


def frozen(config):
    """The negative prompt, and what adapters adapt."""
    return latent.unconditional(config) | student.base(config)


def data(config):
    """Batches {"latents" [B, F, h, w, C], "context" [B, text_len, text_dim]}: the first config.frames of every record."""
    latent.negative(config)  # read for its mistakes
    batches = latent.records(config, "latents", frames=config.frames)
    return batches.map(lambda batch: batch | {"latents": batch["latents"][:, : config.frames]})


def update(config):
    """f(state, frozen params, batch, step) → (state, metrics)."""
    parts, (optimizer, options) = latent.parts(config), student.optimizer(config)
    whole = student.working(config)

    @compilation.training_step
    def step_once(state, fixed, batch, step):
        negative = fixed["negative"]["context"][None]
        key = jax.random.fold_in(jax.random.key(config.seed), step)

        def objective(params, batch, index):
            x0, context = batch["latents"].astype(jnp.float32), batch["context"]
            keys = jax.random.split(jax.random.fold_in(key, index), 3)
            t, weight = levels(parts.rollout, keys[0], *x0.shape[:2])
            keep = jax.random.uniform(keys[1], (x0.shape[0], 1, 1)) >= DROPPED
            context, noise = jnp.where(keep, context, negative), jax.random.normal(keys[2], x0.shape)
            loss = losses.diffusion_loss(parts.dit, whole(params, fixed), x0, context, t, noise, weight)
            return loss, {"loss": loss}

        return train.descend(state, objective, batch, optimizer, options, config.accumulate)

    return step_once


def levels(rollout, key, batch, frames):
    """Timesteps [B, F] and weights [B, F] of mean 1: a level a clip; in CONTINUED of them the first blocks are 0 and count 0.

    A clip of a single block has nothing to go on from: all of it is noisy.
    """
    block = jnp.arange(frames) // rollout.block_frames
    level_key, kind_key, length_key = jax.random.split(key, 3)
    t = losses.table_draw(jax.random.uniform(level_key, (batch, 1)), rollout.shift)
    continued = jax.random.uniform(kind_key, (batch, 1)) < CONTINUED
    blocks = -(-frames // rollout.block_frames)
    length = jnp.minimum(jax.random.randint(length_key, (batch, 1), 1, blocks), blocks - 1)
    counts = jnp.where(continued & (block[None] < length), 0.0, 1.0)
    return t * counts, counts / counts.mean()


def generate(config):
    """f(params, frozen params, context, keys) → latents [B, F, h, w, C], config.frames by the guided sampler.

    context [B, text_len, text_dim]; keys [B], one a clip. Guidance leads away from the frozen "negative".
    """
    parts, guidance, solver_steps = latent.parts(config), config.guidance, config.solver_steps
    shape = config.frames, *parts.frame_shape[1:]

    def solve(params, fixed, context, keys):
        noise = axes.constrain(jax.vmap(lambda key: jax.random.normal(key, shape))(keys), "batch")
        return teacher.ode_trajectory(
            parts.dit,
            params,
            noise,
            context,
            jnp.broadcast_to(fixed["negative"]["context"], context.shape),
            guidance,
            solver_steps,
            parts.rollout.shift,
        )[-1]

    return solve


def sample(config):
    """f(state, frozen params, key) → clips of held-out captions."""
    return clips.shown(config, generate(config))


def evaluate(config):
    """f(state, frozen params) → {"right_shape": …, …}."""
    return clips.judged(config, generate(config))

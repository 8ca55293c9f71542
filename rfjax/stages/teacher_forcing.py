"""Stage `teacher_forcing`: a causal student by flow matching on clips of latents (CausVid, arXiv 2412.07772).

Every block draws its own noise level from the shifted training table, all of equal weight, and sees the clean blocks before it.
Another way than `ode` to the student that distillation starts from: it needs no trajectories of a teacher.
"""

import jax
import jax.numpy as jnp

from rfjax import compilation, losses
from rfjax import state as train
from rfjax.stages import latent, student, teacher


def data(config):
    """The teacher's batches; UserError unless config.frames are whole blocks."""
    latent.whole_blocks(config, "frames")
    return teacher.data(config)


def update(config):
    """f(state, frozen params, batch, step) → (state, metrics)."""
    parts, (optimizer, options) = latent.parts(config), student.optimizer(config)
    whole, block_frames = student.working(config), parts.rollout.block_frames

    @compilation.training_step
    def step_once(state, fixed, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)

        def objective(params, batch, index):
            x0, context = batch["latents"].astype(jnp.float32), batch["context"]
            keys = jax.random.split(jax.random.fold_in(key, index))
            t, noise = levels(parts.rollout, keys[0], *x0.shape[:2]), jax.random.normal(keys[1], x0.shape)
            loss = losses.teacher_forcing_loss(
                parts.dit, whole(params, fixed), x0, context, t, noise, block_frames
            )
            return loss, {"loss": loss}

        return train.descend(state, objective, batch, optimizer, options, config.accumulate)

    return step_once


def levels(rollout, key, batch, frames):
    """Timesteps [B, F]: each block draws its own."""
    uniform = jax.random.uniform(key, (batch, frames // rollout.block_frames))
    return jnp.repeat(losses.table_draw(uniform, rollout.shift), rollout.block_frames, axis=1)

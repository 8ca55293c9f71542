"""Stage `ode`: the causal student learns to predict the end of the teacher's trajectories (CausVid, arXiv 2412.07772, 4.3).

Every block draws its own few-step level k; its input is the trajectory's point at t_k, under the block-causal mask.
"""

import jax
import jax.numpy as jnp

from rfjax import compilation, losses, rollout
from rfjax import state as train
from rfjax.stages import clips, latent, student
from rfjax.stream import method_of


def data(config):
    """Batches {"trajectory" [B, S + 1, F, h, w, C]: points at t_0 … t_{S-1} and the end; "context"}."""
    points = len(config.rollout.steps) + 1
    return latent.records(config, "trajectory", (points,), config.rollout.block_frames)


def update(config):
    """f(state, frozen params, batch, step) → (state, metrics)."""
    parts, (optimizer, options) = latent.parts(config), student.optimizer(config)
    whole = student.working(config)
    block_frames, timesteps = parts.rollout.block_frames, jnp.asarray(parts.rollout.timesteps)

    @compilation.training_step
    def step_once(state, fixed, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)

        def objective(params, batch, index):
            path, context = batch["trajectory"].astype(jnp.float32), batch["context"]
            blocks = path.shape[2] // block_frames
            draw = jax.random.fold_in(key, index)
            level = jax.random.randint(draw, (path.shape[0], blocks), 0, parts.rollout.num_steps)
            level = jnp.repeat(level, block_frames, axis=1)  # [B, F]
            x_t = jnp.take_along_axis(path, level[:, None, :, None, None, None], 1)[:, 0]
            loss = losses.ode_loss(
                parts.dit, whole(params, fixed), x_t, timesteps[level], path[:, -1], context, block_frames
            )
            return loss, {"loss": loss}

        return train.descend(state, objective, batch, optimizer, options, config.accumulate)

    return step_once


def generate(config):
    """f(params, frozen params, context, keys) → latents [B, F, h, w, C], config.frames rolled out by config.method.

    context [B, text_len, text_dim]; keys [B], one a clip.
    """
    parts = latent.parts(config)
    latent.whole_blocks(config, "frames")
    method = method_of(config)

    def roll(params, fixed, context, keys):
        del fixed
        text_kv = parts.dit.apply({"params": params}, context, method="text_kv")
        model = rollout.Model(parts.dit, params, text_kv, parts.rollout)
        noise = rollout.position_noise(keys, parts.frame_shape)
        blocks = config.frames // parts.rollout.block_frames
        return rollout.rollout(model, noise, context.shape[0], blocks, parts.frame_shape, method)

    return roll


def sample(config):
    """f(state, frozen params, key) → clips of held-out captions."""
    return clips.shown(config, generate(config))


def evaluate(config):
    """f(state, frozen params) → {"right_shape": …, …} over config.frames."""
    return clips.judged(config, generate(config))

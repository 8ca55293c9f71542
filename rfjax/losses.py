"""Training objectives, all in float32: pure functions from predictions or networks to (loss, …).

Sources: flow matching as in Wan (arXiv 2503.20314); teacher forcing and ODE initialisation, CausVid (2412.07772);
distribution matching distillation, DMD (2311.18828) and DMD2 (2405.14867). Clips are latents [B, F, H, W, C].
"""

import jax
import jax.numpy as jnp
from jax import Array

from rfjax import attention, flow
from rfjax.dit import DiT
from rfjax.teacher import guided_flow, predict_flow


def mean_square(error: Array, weight: Array | None = None) -> Array:
    """Mean of error², or its weighted mean over clips or frames: weight [B] or [B, F], mean 1."""
    square = error.astype(jnp.float32) ** 2
    if weight is not None:
        square = square * weight.reshape(weight.shape + (1,) * (square.ndim - weight.ndim))
    return square.mean()


def table_draw(uniform: Array, shift: float) -> Array:
    """Timesteps of the training table picked by u in [0, 1), of u's shape."""
    index = jnp.floor(uniform * flow.NUM_TRAIN_TIMESTEPS).astype(jnp.int32)
    return jnp.asarray(flow.NUM_TRAIN_TIMESTEPS * flow.training_sigmas(shift))[index]


def diffusion_loss(
    dit: DiT,
    params,
    x0: Array,
    context: Array,
    t: Array,
    noise: Array,
    weight: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Flow matching: mean ‖v - (ε - x0)‖². t [B] (one level a clip) or [B, F]; a frame mask makes it block-causal."""
    x_t = flow.add_noise(x0, noise, t)
    return mean_square(predict_flow(dit, params, x_t, t, context, mask) - (noise - x0), weight)


def teacher_forcing_loss(
    dit: DiT,
    params,
    x0: Array,
    context: Array,
    t: Array,
    noise: Array,
    block_frames: int,
) -> Array:
    """Flow matching on the noisy half of [clean | noisy]: each noisy block sees the clean past, t [B, F]."""
    frames = x0.shape[1]
    mask = attention.teacher_forcing_mask(frames, block_frames)
    out = teacher_forcing_flow(dit, params, x0, flow.add_noise(x0, noise, t), t, context, mask)
    return mean_square(out - (noise - x0))


def teacher_forcing_flow(
    dit: DiT, params, clean: Array, x_t: Array, t: Array, context: Array, mask: Array
) -> Array:
    """Flow [B, F, H, W, C] of the noisy half x_t at t [B, F], both halves at the same positions, the clean one at t = 0.

    clean, x_t [B, F, H, W, C]; context [B, text_len, text_dim]; mask [2F, 2F] bool, see `attention.teacher_forcing_mask`.
    """
    variables, frames = {"params": params}, clean.shape[1]
    text_kv = dit.apply(variables, context, method="text_kv")
    positions = jnp.tile(jnp.arange(frames), 2)
    both, levels = jnp.concatenate([clean, x_t], 1), jnp.concatenate([jnp.zeros_like(t), t], 1)
    return dit.apply(variables, both, levels, text_kv, positions, None, mask)[0][:, frames:]


def ode_loss(dit: DiT, params, x_t: Array, t: Array, x0: Array, context: Array, block_frames: int) -> Array:
    """ODE regression: x0 predicted from a trajectory's points under the block-causal mask, against the trajectory's end.

    x_t [B, F, H, W, C] holds every block at its own point; t [B, F] says which.
    """
    mask = attention.block_causal_mask(x0.shape[1], block_frames)
    predicted = flow.x0_from_flow(x_t, predict_flow(dit, params, x_t, t, context, mask), t)
    return mean_square(predicted - x0)


def score_x0(dit: DiT, params, x_t: Array, t: Array, context: Array) -> Array:
    """x0 that a score network sees in x_t; t [B]."""
    return flow.x0_from_flow(x_t, predict_flow(dit, params, x_t, t, context), t)


def guided_x0(dit: DiT, params, x_t: Array, t: Array, context: Array, negative: Array, scale: float) -> Array:
    """x0 that the guided teacher sees in x_t; t [B]."""
    return flow.x0_from_flow(x_t, guided_flow(dit, params, x_t, t, context, negative, scale), t)


def dmd_gradient(x: Array, fake_x0: Array, real_x0: Array) -> Array:
    """g = (μ_fake - μ_real) / mean|x - μ_real|, the mean per sample; NaN → 0 (DMD eq. 7 and 8, in x0 terms)."""
    scale = jnp.abs(x - real_x0).mean(tuple(range(1, x.ndim)), keepdims=True)
    return jnp.nan_to_num((fake_x0 - real_x0) / scale, nan=0.0)


def dmd_loss(x: Array, gradient: Array, frame_mask: Array | None = None) -> Array:
    """½·mean (x - stop_gradient(x - g))² over the frames in frame_mask [F]; its gradient in x is g / count."""
    return _frame_mean(0.5 * (x - jax.lax.stop_gradient(x - gradient)) ** 2, frame_mask)


def sid_loss(x: Array, fake_x0: Array, real_x0: Array, frame_mask: Array | None = None) -> Array:
    """Score identity distillation with α = 1 (arXiv 2404.04057, in x0 terms): mean (μ_real - μ_fake)·(μ_fake - x) / w.

    w = mean|x - μ_real| of each sample, a constant; NaN → 0. The mean is over the frames in frame_mask [F]. Both scores are
    functions of the clip, and the gradient goes through them.
    """
    scale = jnp.abs(x - real_x0).mean(tuple(range(1, x.ndim)), keepdims=True)
    product = (real_x0 - fake_x0) * (fake_x0 - x) / jax.lax.stop_gradient(scale)
    return _frame_mean(jnp.nan_to_num(product, nan=0.0), frame_mask)


def _frame_mean(values: Array, frame_mask: Array | None) -> Array:
    """Mean of [B, F, H, W, C] over the frames in frame_mask [F]."""
    if frame_mask is None:
        return values.mean()
    weight = frame_mask.astype(jnp.float32)
    return (values.mean((0, 2, 3, 4)) * weight).sum() / weight.sum()


def critic_loss(dit: DiT, params, x: Array, context: Array, t: Array, noise: Array) -> Array:
    """Flow matching of the fake score on the student's own clips; t [B]."""
    return diffusion_loss(dit, params, jax.lax.stop_gradient(x), context, t, noise)

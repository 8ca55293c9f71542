"""Rectified flow (Wan 2.1, arXiv 2503.20314): x_σ = (1 - σ)·x0 + σ·ε, and the network predicts the flow v = ε - x0.

A timestep is t = 1000·σ. Functions take t with the leading axes of x (for a video [B, F, H, W, C]: [B] or [B, F])
and broadcast it over the rest.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma, shift: float):
    """Shifts noise levels towards 1, as high resolutions need: σ → s·σ / (1 + (s - 1)·σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_sigmas(shift: float) -> np.ndarray:
    """The training table [1000], float32: shift(i / 1000) for i = 1000 … 1, so it falls from 1 and never reaches 0."""
    levels = np.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=np.float64) / NUM_TRAIN_TIMESTEPS
    return shift_sigma(levels, shift).astype(np.float32)


def few_step_timesteps(steps: tuple[int, ...], shift: float) -> np.ndarray:
    """The few-step list, warped: t_k = 1000·shift(n_k / 1000), float32 [S]. [1000, 800, …] → [1000, 952.381, …].

    ValueError unless it falls from at most 1000 to above 0.
    """
    levels = np.asarray(steps, np.float64) / NUM_TRAIN_TIMESTEPS
    if not levels.size or levels[0] > 1 or (np.diff([*levels, 0]) >= 0).any():
        raise ValueError(f"steps must fall from at most {NUM_TRAIN_TIMESTEPS} to above 0, not {tuple(steps)}")
    return (NUM_TRAIN_TIMESTEPS * shift_sigma(levels, shift)).astype(np.float32)


def loss_weights(shift: float) -> np.ndarray:
    """Diffusion-loss weight that Wan's recipe gives every entry of the training table [1000], float32. The stages weigh them alike.

    A Gaussian bump around t = 500, exp(-2·((t - 500)/1000)²), minus its minimum, scaled to mean 1.
    """
    t = NUM_TRAIN_TIMESTEPS * training_sigmas(shift).astype(np.float64)
    bump = np.exp(-2 * ((t - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    bump -= bump.min()
    return (bump / bump.mean()).astype(np.float32)


def sigma_like(t: Array, x: Array) -> Array:
    """σ = t / 1000 in float32, with trailing axes of size 1 so that it broadcasts over x."""
    sigma = jnp.asarray(t, jnp.float32) / NUM_TRAIN_TIMESTEPS
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def add_noise(x0: Array, noise: Array, t: Array) -> Array:
    """x_σ = (1 - σ)·x0 + σ·ε."""
    sigma = sigma_like(t, x0)
    return (1 - sigma) * x0 + sigma * noise


def x0_from_flow(x_t: Array, flow: Array, t: Array) -> Array:
    """x0 = x_σ - σ·v, in float32."""
    return x_t - sigma_like(t, x_t) * flow.astype(jnp.float32)


def flow_from_x0(x_t: Array, x0: Array, t: Array) -> Array:
    """v = (x_σ - x0) / σ, in float32; σ must not be 0."""
    return (x_t - x0) / sigma_like(t, x_t)


def random_timesteps(uniform: Array, shift: float, low: float = 0.0, high: float = 1000.0) -> Array:
    """Timesteps from uniform draws u in [0, 1): floor(1000·u), shifted, clamped to [low, high]."""
    sigma = shift_sigma(jnp.floor(uniform * NUM_TRAIN_TIMESTEPS) / NUM_TRAIN_TIMESTEPS, shift)
    return jnp.clip(NUM_TRAIN_TIMESTEPS * sigma, low, high)

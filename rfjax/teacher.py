"""The bidirectional teacher: guided flow, and a sampler that records the ODE trajectory the student starts from."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax import flow
from rfjax.dit import DiT
from rfjax.errors import UserError


def predict_flow(dit: DiT, params, x: Array, t: Array, context: Array, mask: Array | None = None) -> Array:
    """Flow [B, F, H, W, C] of a clip x with timesteps t [B] or [B, F] and text embeddings [B, text_len, text_dim]."""
    variables = {"params": params}
    text_kv = dit.apply(variables, context, method="text_kv")
    t = jnp.broadcast_to(t[:, None] if t.ndim == 1 else t, x.shape[:2])
    return dit.apply(variables, x, t, text_kv, jnp.arange(x.shape[1]), None, mask)[0]


def guided_flow(dit: DiT, params, x: Array, t: Array, context: Array, negative: Array, scale: float) -> Array:
    """Classifier-free guidance (arXiv 2207.12598), cond + scale·(cond - uncond), both branches in one call of batch 2B."""
    twice = [jnp.concatenate([a, a]) for a in (x, t)]
    both = predict_flow(dit, params, *twice, jnp.concatenate([context, negative]))
    cond, uncond = jnp.split(both, 2)
    return cond + scale * (cond - uncond)


def solver_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """Noise levels of a sampler, [num_steps + 1], from 1 to 0, evenly spaced before the shift."""
    return flow.shift_sigma(np.linspace(1, 0, num_steps + 1), shift).astype(np.float32)


def few_step_indices(steps: tuple[int, ...], num_steps: int) -> np.ndarray:
    """Where the few-step list lies on the sampler's grid, [S]; UserError if it does not."""
    places = np.asarray([(1 - n / flow.NUM_TRAIN_TIMESTEPS) * num_steps for n in steps])
    if not np.allclose(places, places.round()):
        raise UserError(
            f"A sampler of {num_steps} steps does not pass through the few-step list {list(steps)}; choose another number of steps."
        )
    return places.round().astype(np.int32)


def ode_trajectory(
    dit: DiT,
    params,
    noise: Array,
    context: Array,
    negative: Array,
    scale: float,
    num_steps: int,
    shift: float,
) -> Array:
    """All points of the guided probability-flow ODE from noise to clip: [num_steps + 1, B, F, H, W, C].

    Second-order Adams-Bashforth on the uneven grid, started by one Euler step: one guided call a step.
    """
    sigmas = jnp.asarray(solver_sigmas(num_steps, shift))
    steps = sigmas[1:] - sigmas[:-1]
    ratios = jnp.concatenate([jnp.zeros(1), steps[1:] / steps[:-1]])  # 0 makes the first step Euler's

    def advance(carry, inputs):
        x, last = carry
        sigma, step, ratio = inputs
        v = guided_flow(dit, params, x, jnp.broadcast_to(1000 * sigma, x.shape[:1]), context, negative, scale)
        x = x + step * (v + 0.5 * ratio * (v - last))
        return (x, v), x

    _, path = jax.lax.scan(advance, (noise, jnp.zeros_like(noise)), (sigmas[:-1], steps, ratios))
    return jnp.concatenate([noise[None], path])

"""Rollouts with gradient (Rolling Forcing §3.3, Self Forcing §3.2): roll out constant, then run the gradient windows again.

The clip is rolled out without gradient; the inputs of the calls that shall carry gradient are stashed on the way, and the cache is
made large enough to evict nothing, so that every one of those calls can be repeated afterwards, with gradient, against the same
keys and values. Exit step and clip length are traced: one compiled program serves them all.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rfjax import axes, rollout
from rfjax.cache import KVCache
from rfjax.rollout import Model, NoiseFn


class Plan(NamedTuple):
    """The clip to roll out: num_blocks ≤ max_blocks blocks of [batch, *frame_shape]."""

    noise: NoiseFn
    exit_step: Array  # [] which denoising step carries gradient, 0 … S-1
    num_blocks: Array  # [] blocks of the clip; what comes after them means nothing
    max_blocks: int  # blocks that are rolled out, whatever the clip's length
    batch: int
    frame_shape: tuple[int, int, int, int]  # (f, H, W, C) of a block
    scored_blocks: int = 0  # at the clip's end, which are scored; 0: as many as the span has


class Stash(NamedTuple):
    """A rolled-out clip of at most N blocks: M gradient calls of W blocks each, and the cache that they saw."""

    inputs: Array  # [M, B, W, f, H, W, C] what went into each call
    outputs: Array  # [M, B, W, f, H, W, C] its x0
    cache: KVCache  # every clean block of the clip
    call: Array  # [N] which call makes block b,
    slot: Array  # [N] where in its window,
    last: Array  # [N] and the last block of that window


def remember_all(model: Model, max_blocks: int) -> Model:
    """The model with a ring that evicts nothing within max_blocks."""
    ring = max(max_blocks, model.config.ring_blocks)
    return model.replace(config=dataclasses.replace(model.config, ring_blocks=ring))


def rolling(model: Model, plan: Plan) -> Stash:
    """Rolls out num_blocks blocks; windows i with i mod S = exit_step are the gradient calls."""
    steps, (noise, exit_step, num_blocks, max_blocks, batch, frame_shape, _) = model.config.num_steps, plan
    num_calls = (max_blocks + steps - 2) // steps + 1
    empty = jnp.zeros((num_calls, batch, steps, *frame_shape))
    empty = axes.constrain(empty, None, "batch")

    def window(carry, _):
        state, inputs, outputs = carry
        state = rollout.enter(model, noise, state)
        x0 = rollout.window_call(model, state.cache, state.window, state.index, num_blocks, steady=False)
        call = jnp.where(
            state.index % steps == exit_step, state.index // steps, num_calls
        )  # num_calls: dropped
        inputs = inputs.at[call].set(state.window, mode="drop")
        outputs = outputs.at[call].set(x0, mode="drop")
        kv = rollout.finished_kv(model, state, x0, steady=False)
        return (rollout.leave(model, noise, state, x0, kv), inputs, outputs), None

    start = (rollout.rolling_init(model, batch, frame_shape), empty, empty)
    (state, inputs, outputs), _ = jax.lax.scan(window, start, None, length=max_blocks + steps - 1)
    block = jnp.arange(max_blocks)
    call = jnp.maximum(-((exit_step - block) // steps), 0)  # ceil: the first gradient window that has block b
    index = exit_step + steps * call
    slot = block - jnp.maximum(index - steps + 1, 0)
    return Stash(inputs, outputs, state.cache, call, slot, jnp.minimum(index, num_blocks - 1))


def self_forcing(model: Model, plan: Plan) -> Stash:
    """Rolls out max_blocks blocks, each for steps 0 … exit_step; the last executed step is the gradient call."""
    noise, exit_step, _, max_blocks, batch, frame_shape, _ = plan

    def block_step(cache, block):
        x0, last_input = rollout.denoise_block(model, noise, cache, block, exit_step, steady=False)
        return rollout.clean_call(model, cache, block, x0, steady=False), (last_input[:, None], x0[:, None])

    cache = rollout.self_forcing_init(model, batch, frame_shape).cache
    block = jnp.arange(max_blocks)
    cache, (inputs, outputs) = jax.lax.scan(block_step, cache, block)
    return Stash(inputs, outputs, cache, block, jnp.zeros_like(block), block)


def _clip(stash: Stash, outputs: Array) -> Array:
    """Every block from the call that makes it: [B, N·f, H, W, C]."""
    return rollout.flat(jnp.moveaxis(outputs[stash.call, :, stash.slot], 0, 1))


def constant_rollout(model: Model, method: str, plan: Plan) -> Array:
    """The clip [B, max_blocks·f, H, W, C] that a gradient rollout gives, as a constant. Frames past num_blocks·f mean nothing."""
    model = jax.lax.stop_gradient(remember_all(model, plan.max_blocks))
    stash = STASHES[method](model, plan)
    return _clip(stash, stash.outputs)


def gradient_rollout(model: Model, method: str, plan: Plan) -> Array:
    """The same clip with gradient: in the parameters and text keys, through the gradient calls alone.

    Windows, re-noised inputs and cache are constants. A call whose window ends before the clip's last `scored_blocks` carries no
    gradient, so that what is scored is all that is trained.
    """
    model = remember_all(model, plan.max_blocks)
    stash = jax.lax.stop_gradient(STASHES[method](jax.lax.stop_gradient(model), plan))

    @jax.checkpoint
    def again(call):
        index, window = call
        if method == "rolling":
            position = plan.exit_step + model.config.num_steps * index
            return rollout.window_call(model, stash.cache, window, position, plan.num_blocks, steady=False)
        return rollout.block_call(model, stash.cache, window[:, 0], index, plan.exit_step, steady=False)[
            :, None
        ]

    clip = _clip(stash, jax.lax.map(again, (jnp.arange(stash.inputs.shape[0]), stash.inputs)))
    scored = plan.scored_blocks or model.config.span_blocks
    carries = jnp.repeat(stash.last >= plan.num_blocks - scored, model.config.block_frames)
    return jnp.where(carries[None, :, None, None, None], clip, jax.lax.stop_gradient(clip))


STASHES = {"rolling": rolling, "self_forcing": self_forcing}

"""Rolling Forcing and Self Forcing rollouts (arXiv 2509.25161, 2506.08009): one step, driven by a scan or (`stream.py`) for ever.

A stream that is taken block by block and takes new prompts is `rfjax.stream.Stream` of latents, `rfjax.live.Stream` of frames.

A clip is blocks 0 … n-1 of f latent frames. Rolling window i holds blocks a … z, a = max(0, i-S+1), z = min(n-1, i); block b is
at denoising step i - b, so noise rises along the window. One network call over the window gives x0 of every block; the oldest
block leaves it finished and is run once more, clean, to write its keys and values in the cache. Self Forcing is the window of
one block, denoised S times. A stream may go on from blocks that are given (an image, a video): they are written to the cache as
clean blocks 0 … g-1, and the first window begins at block g as if it were the clip's first.

Noise is by position: ε of (block b, step k) depends on the sample's key, b and k alone, so a stream, a scan, a resumed run and
any split of the batch see the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from rfjax import axes, flow
from rfjax import cache as kv_cache
from rfjax.dit import KV, DiT, Past

ENDLESS = np.int32(2**30)  # a number of blocks that no stream reaches
NoiseFn = Callable[[Array, Array], Array]  # (block, step) → [B, f, H, W, C]


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The few-step schedule and the memory of a stream."""

    steps: tuple[int, ...] = (1000, 800, 600, 400, 200)  # before the shift
    shift: float = 5.0
    block_frames: int = 3
    sink_blocks: int = 1
    ring_blocks: int = 7
    span_blocks: int = 7
    int8_cache: bool = False  # keys and values of past blocks in 8 bits

    def __post_init__(self):
        object.__setattr__(self, "steps", tuple(self.steps))
        if self.block_frames < 1:
            raise ValueError(f"block_frames must be 1 or more, not {self.block_frames}")
        if len(self.steps) + self.sink_blocks > self.span_blocks:
            raise ValueError(
                f"{len(self.steps)} steps and {self.sink_blocks} sink blocks exceed the span {self.span_blocks}"
            )
        _ = self.timesteps, self.cache  # which see whether steps and blocks make sense

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def timesteps(self) -> np.ndarray:
        return flow.few_step_timesteps(self.steps, self.shift)

    @property
    def cache(self) -> kv_cache.CacheConfig:
        return kv_cache.CacheConfig(self.sink_blocks, self.ring_blocks, self.span_blocks, self.int8_cache)


@struct.dataclass
class Model:
    """A network bound to its weights and prompts, as a pytree."""

    dit: DiT = struct.field(pytree_node=False)
    params: Any
    text_kv: KV  # [L, B, text_len, A, K]
    config: RolloutConfig = struct.field(pytree_node=False)
    policy: kv_cache.Policy = struct.field(pytree_node=False, default=kv_cache.SINK_RING)

    def x0(
        self, x: Array, t: Array, positions: Array, past: Past | None, mask: Array | None = None
    ) -> tuple[Array, KV]:
        """x0 [B, F, H, W, C] and the window's keys and values, from x_t with one t a frame [F]."""
        t = jnp.broadcast_to(t, x.shape[:2])
        out, kv = self.dit.apply({"params": self.params}, x, t, self.text_kv, positions, past, mask)
        return flow.x0_from_flow(x, out, t), kv


def position_noise(keys: Array, frame_shape: tuple[int, ...]) -> NoiseFn:
    """ε by position for samples with keys [B]; frame_shape = (f, H, W, C)."""

    def noise(block, step):
        def draw(key):
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, block), step), frame_shape)

        return jax.vmap(draw)(keys)

    return noise


def array_noise(noise: Array) -> NoiseFn:
    """ε from an explicit array [B, block, step, f, H, W, C]; blocks beyond its end repeat the last."""
    noise = jnp.asarray(noise)  # traced indices do not go into a numpy array
    return lambda block, step: noise[:, block, step]


@struct.dataclass
class RolloutState:
    """All that a stream carries from block to block: constant in size however long it runs."""

    window: Array  # [B, S, f, H, W, C] noisy blocks a … a+S-1 (rolling); [B, 0, …] (Self Forcing)
    cache: kv_cache.KVCache
    index: Array  # int32: rolling window i, or Self-Forcing block b
    given: Array  # int32: how many blocks were given; no window reaches back to them
    clean: Array | None = None  # [B, slots, f, H, W, C] cached blocks' x0, where prompts may recache


def _frames(blocks: Array, block_frames: int) -> Array:
    """First frames of blocks [M] → positions of all their frames [M·f]."""
    return (blocks[:, None] * block_frames + jnp.arange(block_frames)[None]).reshape(-1)


def flat(blocks: Array) -> Array:
    """[B, M, f, H, W, C] → [B, M·f, H, W, C]."""
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def clean_kv(model: Model, cache: kv_cache.KVCache, block: Array, x0: Array, steady: bool) -> KV:
    """Keys and values [L, B, N, A, K] of a finished block [B, f, H, W, C], run alone at t = 0."""
    frames = model.config.block_frames
    past = model.policy.read_clean(cache, block, frames, steady)
    return model.x0(x0, jnp.zeros(frames), _frames(block[None], frames), past)[1]


def clean_call(
    model: Model, cache: kv_cache.KVCache, block: Array, x0: Array, steady: bool
) -> kv_cache.KVCache:
    """Runs a finished block [B, f, H, W, C] alone at t = 0 and writes its keys and values."""
    return model.policy.write(cache, block, clean_kv(model, cache, block, x0, steady))


def recalling(state: RolloutState) -> RolloutState:
    """An empty state with room for the x0 of what it caches."""
    batch, _, *frame_shape = state.window.shape
    return state.replace(clean=jnp.zeros((batch, state.cache.block.size, *frame_shape)))


def recall(clean: Array | None, cache: kv_cache.KVCache, block: Array, x0: Array) -> Array | None:
    """Keeps the x0 [B, f, H, W, C] of a block that is cached beside its keys, where there is room."""
    if clean is None:
        return None
    here = cache.block == block
    slot = jnp.argmax(here)
    x0 = jnp.where(here.any(), x0, jax.lax.dynamic_index_in_dim(clean, slot, axis=1, keepdims=False))
    return jax.lax.dynamic_update_index_in_dim(clean, x0, slot, axis=1)


# Rolling Forcing


def rolling_init(model: Model, batch: int, frame_shape: tuple[int, ...]) -> RolloutState:
    """An empty window and cache; frame_shape = (f, H, W, C)."""
    window = jnp.zeros((batch, model.config.num_steps, *frame_shape))
    return RolloutState(
        window=axes.constrain(window, "batch"),
        cache=_init_cache(model, batch, frame_shape),
        index=jnp.int32(0),
        given=jnp.int32(0),
    )


def _init_cache(model: Model, batch: int, frame_shape: tuple[int, ...]) -> kv_cache.KVCache:
    c = model.dit.config
    tokens = int(np.prod(frame_shape[:3])) // int(np.prod(c.patch_size))
    return kv_cache.init(model.config.cache, c, batch, tokens)


def window_call(
    model: Model,
    cache: kv_cache.KVCache,
    window: Array,
    index: Array,
    num_blocks: Array,
    given: Array | int = 0,
    *,
    steady: bool,
) -> Array:
    """One network call over rolling window `index` [B, S, f, H, W, C]. Returns x0, of the same shape.

    Near the ends of the clip the window holds fewer than S blocks, and the rest is masked; `steady` promises all S.
    """
    first = oldest(model.config, index, given)
    blocks = first + jnp.arange(model.config.num_steps)
    step = jnp.clip(index - blocks, 0, model.config.num_steps - 1)
    return denoise(model, cache, window, blocks, step, (blocks <= index) & (blocks < num_blocks), steady)


def denoise(
    model: Model,
    cache: kv_cache.KVCache,
    window: Array,
    blocks: Array,
    step: Array,
    inside: Array,
    steady: bool,
) -> Array:
    """x0 of consecutive blocks [S], each at a denoising step of its own [S], all in one call; those not `inside` [S] are masked."""
    c = model.config
    size = c.num_steps if steady else inside.sum()
    past = model.policy.read_denoise(cache, blocks[0], size, c.block_frames, steady)
    mask = None
    if not steady:
        mask = jnp.repeat(inside, c.block_frames)[None]
    t = jnp.repeat(jnp.asarray(c.timesteps)[step], c.block_frames)
    x0, _ = model.x0(flat(window), t, _frames(blocks, c.block_frames), past, mask)
    return x0.reshape(window.shape)


def enter(model: Model, noise: NoiseFn, state: RolloutState) -> RolloutState:
    """Block z = i comes into its place in the window as pure noise."""
    slot = jnp.minimum(state.index - state.given, model.config.num_steps - 1)
    return state.replace(window=state.window.at[:, slot].set(noise(state.index, jnp.int32(0))))


def noised(model: Model, noise: NoiseFn, x0: Array, blocks: Array, step: Array) -> Array:
    """x0 [B, S, f, H, W, C] of blocks [S] with their ε at denoising steps [S]."""
    epsilon = jnp.moveaxis(jax.vmap(noise)(blocks, step), 0, 1)
    t = jnp.broadcast_to(jnp.asarray(model.config.timesteps)[step], x0.shape[:2])
    return flow.add_noise(x0, epsilon, t)


def finished_kv(model: Model, state: RolloutState, x0: Array, steady: bool) -> KV:
    """After window i's call: the clean keys and values [L, B, N, A, K] of block a, if that is finished; if not, zeros."""
    first = oldest(model.config, state.index, state.given)

    def clean():
        return clean_kv(model, state.cache, first, x0[:, 0], steady)

    if steady:
        return clean()
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(clean))
    return jax.lax.cond(_full(model, state), clean, lambda: nothing)


def leave(model: Model, noise: NoiseFn, state: RolloutState, x0: Array, kv: KV) -> RolloutState:
    """After window i's calls: re-noise all blocks; if block a is finished, write its clean keys and move the window on."""
    first, last = oldest(model.config, state.index, state.given), model.config.num_steps - 1
    full = _full(model, state)
    blocks = first + jnp.arange(last + 1)
    # One step down; the finished one is at the last t, unused.
    window = noised(model, noise, x0, blocks, jnp.clip(state.index - blocks + 1, 0, last))
    cache = model.policy.write(state.cache, first, kv, full)
    return state.replace(
        window=jnp.where(full, jnp.roll(window, -1, axis=1), window),
        cache=cache,
        clean=recall(state.clean, cache, first, x0[:, 0]),
        index=state.index + 1,
    )


def oldest(config: RolloutConfig, index: Array, given: Array | int) -> Array:
    """Block a of window i: the first S hold fewer than S blocks, and no window reaches back to given ones."""
    return jnp.maximum(index - config.num_steps + 1, given)


def _full(model: Model, state: RolloutState) -> Array:
    """Whether window i finishes block a: not in the first S - 1."""
    return state.index - state.given >= model.config.num_steps - 1


def rolling_calls(
    model: Model, noise: NoiseFn, num_blocks: Array, state: RolloutState, steady: bool
) -> tuple[Array, KV]:
    """Rolling window i, every block a step denoised [B, S, f, H, W, C], and the clean keys and values of block a.

    In the first S-1 windows nothing is finished, and these are zeros. The ramps at both ends take a masked path; in between, which
    `steady` promises, nothing is masked and no key is wasted.
    """
    state = enter(model, noise, state)
    x0 = window_call(model, state.cache, state.window, state.index, num_blocks, state.given, steady=steady)
    return x0, finished_kv(model, state, x0, steady)


def rolling_steady(config: RolloutConfig, state: RolloutState, num_blocks: Array) -> Array:
    """Whether the next window holds S blocks, and the cache all that they see."""
    first = state.index - config.num_steps + 1
    return (first >= jnp.maximum(config.span_blocks, state.given)) & (state.index < num_blocks)


# Self Forcing


def self_forcing_init(model: Model, batch: int, frame_shape: tuple[int, ...]) -> RolloutState:
    """An empty cache; nothing is under way between blocks."""
    cache = _init_cache(model, batch, frame_shape)
    return RolloutState(jnp.zeros((batch, 0, *frame_shape)), cache, jnp.int32(0), jnp.int32(0))


def block_call(
    model: Model, cache: kv_cache.KVCache, x: Array, block: Array, step: Array, steady: bool
) -> Array:
    """x0 of one block [B, f, H, W, C], all its frames at denoising step `step`."""
    c = model.config
    past = model.policy.read_denoise(cache, block, 1, c.block_frames, steady)
    t = jnp.full((c.block_frames,), jnp.asarray(c.timesteps)[step])
    return model.x0(x, t, _frames(block[None], c.block_frames), past)[0]


def denoise_block(
    model: Model, noise: NoiseFn, cache: kv_cache.KVCache, block: Array, last_step: Array, steady: bool
) -> tuple[Array, Array]:
    """Runs steps 0 … last_step on a block. Returns x0 and the input of the last step, both [B, f, H, W, C]."""
    timesteps = jnp.asarray(model.config.timesteps)

    def advance(step, x):
        x0 = block_call(model, cache, x, block, step, steady)
        return flow.add_noise(x0, noise(block, step + 1), jnp.broadcast_to(timesteps[step + 1], x.shape[:1]))

    x = jax.lax.fori_loop(0, last_step, advance, noise(block, jnp.int32(0)))
    return block_call(model, cache, x, block, last_step, steady), x


def self_forcing_calls(
    model: Model, noise: NoiseFn, num_blocks: Array, state: RolloutState, steady: bool
) -> tuple[Array, KV]:
    """Block b from noise to x0 [B, 1, f, H, W, C] in S calls, and the keys and values of its clean call."""
    del num_blocks  # a block never looks ahead, so the clip's end does not matter
    x0, _ = denoise_block(model, noise, state.cache, state.index, model.config.num_steps - 1, steady)
    return x0[:, None], clean_kv(model, state.cache, state.index, x0, steady)


def self_forcing_leave(model: Model, noise: NoiseFn, state: RolloutState, x0: Array, kv: KV) -> RolloutState:
    """After block b's calls: write its clean keys."""
    del noise  # nothing is under way
    cache = model.policy.write(state.cache, state.index, kv)
    clean = recall(state.clean, cache, state.index, x0[:, 0])
    return state.replace(cache=cache, clean=clean, index=state.index + 1)


# Drivers


class Method(NamedTuple):
    """A way to roll out: its first state; a step's calls of the network, when these need no mask, and what the next state is after
    them; and how many steps pass before the first block is finished."""

    init: Callable[..., RolloutState]
    calls: Callable[..., tuple[Array, KV]]
    steady: Callable[[RolloutConfig, RolloutState, Array], Array]
    leave: Callable[..., RolloutState]
    lead: Callable[[RolloutConfig], int]

    def step(
        self,
        model: Model,
        noise: NoiseFn,
        num_blocks: Array,
        state: RolloutState,
        steady: bool | None = None,
    ) -> tuple[RolloutState, Array]:
        """The next state, and the block [B, f, H, W, C] that is finished. `steady`: whether it is, where the caller knows.

        Only the calls are in branches of the program, and they leave the cache alone: one that a branch gave back would be copied
        whole. It is written after them, in place.
        """
        calls = functools.partial(self.calls, model, noise, num_blocks)
        if steady is None:
            masked, plain = (functools.partial(calls, steady=known) for known in (False, True))
            x0, kv = jax.lax.cond(self.steady(model.config, state, num_blocks), plain, masked, state)
        else:
            x0, kv = calls(state, steady)
        return self.leave(model, noise, state, x0, kv), x0[:, 0]


METHODS = {
    "rolling": Method(
        rolling_init, rolling_calls, rolling_steady, leave, lambda config: config.num_steps - 1
    ),
    "self_forcing": Method(
        self_forcing_init,
        self_forcing_calls,
        lambda config, state, num_blocks: state.index >= config.span_blocks,
        self_forcing_leave,
        lambda config: 0,
    ),
}


def rollout(
    model: Model, noise: NoiseFn, batch: int, num_blocks: int, frame_shape: tuple[int, ...], method: str
) -> Array:
    """A whole clip by `lax.scan`: [B, num_blocks·f, H, W, C]. frame_shape = (f, H, W, C)."""
    how = METHODS[method]
    lead = how.lead(model.config)

    def step(state, _):
        return how.step(model, noise, jnp.int32(num_blocks), state)

    _, blocks = jax.lax.scan(step, how.init(model, batch, frame_shape), None, length=num_blocks + lead)
    return flat(jnp.moveaxis(blocks[lead:], 0, 1))

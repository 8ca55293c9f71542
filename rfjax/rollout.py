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
        if len(self.steps) + self.sink_blocks > self.span_blocks:
            raise ValueError(
                f"{len(self.steps)} steps and {self.sink_blocks} sink blocks exceed the span {self.span_blocks}"
            )

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


def clean_call(
    model: Model, cache: kv_cache.KVCache, block: Array, x0: Array, steady: bool
) -> kv_cache.KVCache:
    """Runs a finished block [B, f, H, W, C] alone at t = 0 and writes its keys and values."""
    frames = model.config.block_frames
    past = model.policy.read_clean(cache, block, frames, steady)
    _, kv = model.x0(x0, jnp.zeros(frames), _frames(block[None], frames), past)
    return model.policy.write(cache, block, kv)


def recalling(state: RolloutState) -> RolloutState:
    """An empty state with room for the x0 of what it caches."""
    batch, _, *frame_shape = state.window.shape
    return state.replace(clean=jnp.zeros((batch, state.cache.block.size, *frame_shape)))


def _recall(clean: Array | None, cache: kv_cache.KVCache, block: Array, x0: Array) -> Array | None:
    """Keeps a cached block's x0 [B, f, H, W, C] beside its keys, where there is room."""
    if clean is None:
        return None
    return jax.lax.dynamic_update_index_in_dim(clean, x0, jnp.argmax(cache.block == block), axis=1)


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
    first = jnp.maximum(index - model.config.num_steps + 1, given)
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


def leave(model: Model, noise: NoiseFn, state: RolloutState, x0: Array, steady: bool) -> RolloutState:
    """After window i's call: re-noise all blocks; if block a is finished, write its clean keys and move the window on."""
    last = model.config.num_steps - 1
    first = jnp.maximum(state.index - last, state.given)
    blocks = first + jnp.arange(last + 1)
    # One step down; the finished one is at the last t, unused.
    window = noised(model, noise, x0, blocks, jnp.clip(state.index - blocks + 1, 0, last))

    def finish(window, cache, clean):
        cache = clean_call(model, cache, first, x0[:, 0], steady)
        return jnp.roll(window, -1, axis=1), cache, _recall(clean, cache, first, x0[:, 0])

    stays = window, state.cache, state.clean
    if steady:
        window, cache, clean = finish(*stays)
    else:
        full = state.index - state.given >= last
        window, cache, clean = jax.lax.cond(full, finish, lambda *same: same, *stays)
    return state.replace(window=window, cache=cache, clean=clean, index=state.index + 1)


def rolling_branch(
    model: Model, noise: NoiseFn, num_blocks: Array, state: RolloutState, steady: bool
) -> tuple[RolloutState, Array]:
    """Rolling window i: denoise every block a step, finish block a. Returns the next state and block a [B, f, H, W, C].

    In the first S-1 windows nothing is finished and what is returned has no meaning. The ramps at both ends take a masked path; in
    between, which `steady` promises, nothing is masked and no key is wasted.
    """
    state = enter(model, noise, state)
    x0 = window_call(model, state.cache, state.window, state.index, num_blocks, state.given, steady=steady)
    return leave(model, noise, state, x0, steady), x0[:, 0]


def rolling_steady(config: RolloutConfig, state: RolloutState, num_blocks: Array) -> Array:
    """Whether the next window holds S blocks, and the cache all that they see."""
    first = state.index - config.num_steps + 1
    return (first >= jnp.maximum(config.span_blocks, state.given)) & (state.index < num_blocks)


# Self Forcing


def self_forcing_init(model: Model, batch: int, frame_shape: tuple[int, ...]) -> RolloutState:
    """An empty cache; nothing is under way between blocks."""
    return RolloutState(
        jnp.zeros((batch, 0, *frame_shape)),
        _init_cache(model, batch, frame_shape),
        jnp.int32(0),
        jnp.int32(0),
    )


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


def self_forcing_branch(
    model: Model, noise: NoiseFn, num_blocks: Array, state: RolloutState, steady: bool
) -> tuple[RolloutState, Array]:
    """Block b from noise to x0 in S calls, then its clean call. Returns the next state and the block [B, f, H, W, C]."""
    del num_blocks  # a block never looks ahead, so the clip's end does not matter
    block = state.index
    x0, _ = denoise_block(model, noise, state.cache, block, model.config.num_steps - 1, steady)
    cache = clean_call(model, state.cache, block, x0, steady)
    return state.replace(cache=cache, clean=_recall(state.clean, cache, block, x0), index=block + 1), x0


# Drivers


class Method(NamedTuple):
    """A way to roll out: its first state, its step in two forms and when the steady one holds, and how many steps pass before the
    first block is finished."""

    init: Callable[..., RolloutState]
    branch: Callable[..., tuple[RolloutState, Array]]
    steady: Callable[[RolloutConfig, RolloutState, Array], Array]
    lead: Callable[[RolloutConfig], int]

    def step(
        self, model: Model, noise: NoiseFn, num_blocks: Array, state: RolloutState
    ) -> tuple[RolloutState, Array]:
        """The next state, and the block [B, f, H, W, C] that is finished."""
        branch = functools.partial(self.branch, model, noise, num_blocks)
        return jax.lax.cond(
            self.steady(model.config, state, num_blocks),
            functools.partial(branch, steady=True),
            functools.partial(branch, steady=False),
            state,
        )


METHODS = {
    "rolling": Method(rolling_init, rolling_branch, rolling_steady, lambda config: config.num_steps - 1),
    "self_forcing": Method(
        self_forcing_init,
        self_forcing_branch,
        lambda config, state, num_blocks: state.index >= config.span_blocks,
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


@functools.partial(jax.jit, static_argnames="method", donate_argnames="state")
def stream_step(
    model: Model, method: str, keys: Array, num_blocks: Array, state: RolloutState
) -> tuple[RolloutState, Array]:
    """One compiled step of a stream with noise by position; `state` is donated."""
    noise = position_noise(keys, state.window.shape[2:])
    state, block = METHODS[method].step(model, noise, num_blocks, state)
    return _kept(state), axes.constrain(block, "batch")


def _kept(state: RolloutState) -> RolloutState:
    """On a mesh, the state where its first one was, so that the next step is the same program; the cache sees to itself."""
    clean = None if state.clean is None else axes.constrain(state.clean, "batch")
    return state.replace(window=axes.constrain(state.window, "batch"), clean=clean)


@functools.partial(jax.jit, static_argnames=("method", "batch", "frame_shape", "recall"))
def begin(
    model: Model, method: str, batch: int, frame_shape: tuple[int, ...], recall: bool = False
) -> RolloutState:
    """A stream's state before anything, with room for the x0 of cached blocks if it shall `recall`; frame_shape = (f, H, W, C)."""
    state = METHODS[method].init(model, batch, frame_shape)
    return _kept(recalling(state) if recall else state)


@functools.partial(jax.jit, donate_argnames="state")
def remember(model: Model, state: RolloutState, x0: Array) -> RolloutState:
    """A state before its first step, with one more given block x0 [B, f, H, W, C] in its cache; `state` is donated."""
    cache, clean = clean_call(model, state.cache, state.index, x0, steady=False), state.clean
    state = state.replace(cache=cache, clean=_recall(clean, cache, state.index, x0))
    return _kept(state.replace(index=state.index + 1, given=state.given + 1))

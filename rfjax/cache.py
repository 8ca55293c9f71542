"""The KV cache of a stream: fixed sink slots and a ring buffer of blocks, as a pytree.

Keys are stored as the network makes them, before rotation, so a policy may show a block at any position. A policy is pure
functions: `write` decides what stays, the reads decide what a call sees and where. `SINK_RING` is Rolling Forcing's
(arXiv 2509.25161): block 0 stays for ever, the newest 7 blocks pass through the ring. With `sink_blocks=0` it is the plain
sliding window of Self Forcing (arXiv 2506.08009).

Letters: L layers, B batch, N = tokens of a block, A heads, K head size; blocks are of f latent frames.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from rfjax import axes, quantize
from rfjax.dit import KV, DiTConfig, Past


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What a stream remembers, in blocks."""

    sink_blocks: int = 1  # the first blocks, kept for ever
    ring_blocks: int = 7  # the newest ones
    span_blocks: int = 7  # most blocks that one call attends to, its own included
    int8: bool = False  # kept in 8 bits, a scale for each token and head

    def __post_init__(self):
        if self.sink_blocks < 0 or self.span_blocks <= self.sink_blocks:
            raise ValueError(f"span_blocks {self.span_blocks} must exceed sink_blocks {self.sink_blocks} ≥ 0")
        if self.ring_blocks < self.span_blocks - 1:
            raise ValueError(
                f"ring_blocks {self.ring_blocks} cannot hold the {self.span_blocks - 1} blocks that are read"
            )


@struct.dataclass
class KVCache:
    """Slots [0, sink_blocks) hold the sink, the rest is the ring. `block` says what is where; -1 is empty."""

    kv: KV  # [L, B, slots, N, A, K], keys not rotated; in int8 QArrays with scales [L, B, slots, N, A, 1]
    block: Array  # [slots] int32
    config: CacheConfig = struct.field(pytree_node=False)


def init(config: CacheConfig, dit: DiTConfig, batch: int, block_tokens: int) -> KVCache:
    """An empty cache for blocks of `block_tokens` tokens."""
    slots = config.sink_blocks + config.ring_blocks
    shape = (dit.num_layers, batch, slots, block_tokens, dit.num_heads, dit.head_dim)
    kv = KV(*(jax.tree.map(_placed, _kept(config, jnp.zeros(shape, dit.dtype))) for _ in KV._fields))
    return KVCache(kv, jnp.full((slots,), -1, jnp.int32), config)


def _kept(config: CacheConfig, x: Array):
    """Keys or values [..., A, K] as they are stored."""
    return quantize.quantized(x, "int8") if config.int8 else x


def _placed(slots: Array) -> Array:
    """[L, B, slots, N, A, K] where it lives on a mesh: with its clips, each device its heads."""
    return axes.constrain(slots, None, "batch", None, None, "heads")


def _slot(config: CacheConfig, block: Array) -> Array:
    """Where a block lives: its own sink slot, or its turn in the ring."""
    sinks = config.sink_blocks
    return jnp.where(block < sinks, block, sinks + (block - sinks) % config.ring_blocks)


def write(cache: KVCache, block: Array, kv: KV, when: Array | bool = True) -> KVCache:
    """Stores a finished block's keys and values [L, B, N, A, K], in place of the oldest one in the ring; if not `when`, nothing."""
    slot = _slot(cache.config, block)

    def store(slots, new):
        old = jax.lax.dynamic_index_in_dim(slots, slot, axis=2, keepdims=False)
        # A slice, not a scatter, for which XLA would lay out the whole cache anew.
        new = jnp.where(when, new.astype(slots.dtype), old)
        return _placed(jax.lax.dynamic_update_index_in_dim(slots, new, slot, axis=2))

    stored = jax.tree.map(store, cache.kv, KV(*(_kept(cache.config, x) for x in kv)))
    return cache.replace(kv=stored, block=cache.block.at[slot].set(jnp.where(when, block, cache.block[slot])))


def _read(cache: KVCache, slots: Array, first_frames: Array, block_frames: int, valid: Array | None) -> Past:
    positions = (first_frames[:, None] + jnp.arange(block_frames)[None]).reshape(-1)
    return Past(cache.kv, slots, positions, None if valid is None else jnp.repeat(valid, block_frames))


def _recent(first: Array, count: int) -> Array:
    """Ids of the `count` blocks before block `first`, oldest first; ids below 0 do not exist."""
    return first - count + jnp.arange(count)


def read_denoise(cache: KVCache, first: Array, size, block_frames: int, steady: bool) -> Past:
    """Keys for denoising the window of `size` blocks that begins at block `first`: [sink | recent].

    Recent are the newest `span - sink - size` blocks before the window, fewer if there are not so many, at their true
    positions; the sink is placed just before them. `steady` promises that all of them exist (then `size` is a plain int and
    nothing is masked); otherwise `size` may be traced and the shape is that of the smallest window, one block.
    """
    c = cache.config
    sinks = c.sink_blocks
    most = c.span_blocks - sinks - (size if steady else 1)
    recent = _recent(first, most)
    num_recent = jnp.minimum(c.span_blocks - sinks - size, jnp.maximum(first - sinks, 0))
    num_sinks = jnp.minimum(first, sinks)
    sink = jnp.arange(sinks)
    valid = None
    if not steady:
        valid = jnp.concatenate([sink < num_sinks, recent >= first - num_recent])
    sink_positions = first - num_recent - num_sinks + sink
    slots = jnp.concatenate([sink, _slot(c, jnp.maximum(recent, sinks))])
    return _read(cache, slots, jnp.concatenate([sink_positions, recent]) * block_frames, block_frames, valid)


def read_clean(cache: KVCache, block: Array, block_frames: int, steady: bool) -> Past:
    """Keys for the clean call on `block`: the newest `span - 1` blocks before it, all at their true positions.

    The sink takes part only while it is among them. `steady` promises that all of them exist; of an old block's some may have
    left the ring.
    """
    recent = _recent(block, cache.config.span_blocks - 1)
    slots = _slot(cache.config, jnp.maximum(recent, 0))
    valid = None if steady else (recent >= 0) & (cache.block[slots] == recent)
    return _read(cache, slots, recent * block_frames, block_frames, valid)


class Policy(NamedTuple):
    """How a stream remembers: what `write` keeps, and what the two kinds of call see of it."""

    write: Callable[..., KVCache]
    read_denoise: Callable[..., Past]
    read_clean: Callable[..., Past]


SINK_RING = Policy(write, read_denoise, read_clean)

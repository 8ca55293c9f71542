"""Rotary position embedding over time, height and width (Wan 2.1; RoFormer, arXiv 2104.09864).

A head of size K is K/2 interleaved pairs (x[0], x[1]), (x[2], x[3]), …: the first pairs turn with time, then height,
then width; sizes K - 4⌊K/6⌋, 2⌊K/6⌋, 2⌊K/6⌋. Pair i of a part of size n turns by position · base^(-2i/n).
Only differences of positions matter, so callers pass positions relative to their window and a stream never loses precision.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Rotation(NamedTuple):
    """What a channel of every token, and the other one of its pair, are multiplied by: each [tokens, K], float32."""

    cos: Array
    sin: Array  # negative in the pair's first channel


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """How many channels of a head turn with (time, height, width)."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def _frequencies(size: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, size, 2, dtype=np.float64) / size)


def rotation(positions: Array, height: int, width: int, head_dim: int, base: float = 10000.0) -> Rotation:
    """Angles of all tokens of frames at `positions` [F] (integers, relative), in frame, row, column order."""
    time, rows, columns = (_frequencies(size, base) for size in axis_sizes(head_dim))
    frames = positions.shape[0]
    angles = [
        jnp.asarray(positions, jnp.float32)[:, None, None, None]
        * time.astype(np.float32).reshape(1, 1, 1, -1),
        (np.arange(height)[:, None] * rows).astype(np.float32)[None, :, None],
        (np.arange(width)[:, None] * columns).astype(np.float32)[None, None],
    ]
    angles = [jnp.broadcast_to(a, (frames, height, width, a.shape[-1])) for a in angles]
    angles = jnp.concatenate(angles, -1).reshape(frames * height * width, head_dim // 2)
    # Each angle's number goes to both channels of its pair by a product with zeros and ones, which is exact. Copied there, XLA
    # would work out the sines anew on CPU in every unrolled layer, for each head and channel.
    both = np.repeat(np.eye(head_dim // 2, dtype=np.float32), 2, axis=1)
    sign = np.tile(np.array([-1, 1], np.float32), head_dim // 2)
    cos, sin = (
        jnp.dot(turn, pairs, precision="highest")
        for turn, pairs in ((jnp.cos(angles), both), (jnp.sin(angles), both * sign))
    )
    return Rotation(cos, sin)


def apply(x: Array, rot: Rotation) -> Array:
    """Turns x [B, tokens, A, K] by its tokens' angles; computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    # Not [..., K/2, 2]: for a last dimension of 2, a TPU would lay out x anew, and with it the cache that it is read from.
    first = np.arange(x.shape[-1]) % 2 == 0
    other = jnp.where(first, jnp.roll(x32, -1, axis=-1), jnp.roll(x32, 1, axis=-1))
    return (x32 * rot.cos[None, :, None] + other * rot.sin[None, :, None]).astype(x.dtype)

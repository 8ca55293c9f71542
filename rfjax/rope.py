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
    """cos and sin of every token's angles, each [tokens, K/2], float32."""

    cos: Array
    sin: Array


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
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def apply(x: Array, rot: Rotation) -> Array:
    """Turns x [B, tokens, A, K] by its tokens' angles; computed in float32, returned in x's dtype."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rot.cos[None, :, None], rot.sin[None, :, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)

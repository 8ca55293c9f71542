"""Scaled dot-product attention and the frame-level masks of the causal training forms.

Masks are kept per frame, [query frames, key frames], True where a query may look; tokens of a frame share its row.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MOST_SCORES = 2**26  # held at a time: 256 MiB


def attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """softmax(q·kᵀ / √K)·v. q [B, N, A, K]; k, v [B, M, A, K]; mask [N, M] bool or None. Softmax in float32.

    A query that may look at nothing gets the mean of v, not NaN, so padded windows stay finite. Where there would be more
    than MOST_SCORES scores, queries go a chunk at a time.
    """
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    batch, heads, queries, _ = q.shape
    chunk = max(1, MOST_SCORES // (batch * heads * k.shape[2]))
    if queries <= chunk:
        return jnp.swapaxes(_attend(q, k, v, mask), 1, 2)
    count = -(-queries // chunk)
    spare = count * chunk - queries
    q = jnp.pad(q, ((0, 0), (0, 0), (0, spare), (0, 0)))
    q = einops.rearrange(q, "b a (c n) k -> c b a n k", c=count)
    if mask is not None:
        mask = jnp.pad(mask, ((0, spare), (0, 0))).reshape(count, chunk, -1)
    out = jax.lax.map(lambda part: _attend(part[0], k, v, part[1]), (q, mask))
    return einops.rearrange(out, "c b a n k -> b (c n) a k")[:, :queries]


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Scaled queries [B, A, N, K], keys and values [B, A, M, K] → [B, A, N, K]."""
    scores = jnp.einsum("bank,bamk->banm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    # Dividing [N, K] sums instead of [N, M] weights saves a pass over the scores.
    sums = jnp.einsum("banm,bamk->bank", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (sums / weights.sum(-1, keepdims=True)).astype(v.dtype)


def token_mask(frame_mask: Array, tokens: int) -> Array:
    """[Fq, Fk] per frame → [Fq·T, Fk·T] per token."""
    return einops.repeat(frame_mask, "q k -> (q s) (k t)", s=tokens, t=tokens)


def block_causal_mask(frames: int, block_frames: int) -> np.ndarray:
    """[F, F]: a frame sees every frame of its own block and of all earlier ones. Blocks of 2, 4 frames:

    1 1 . .
    1 1 . .
    1 1 1 1
    1 1 1 1
    """
    block = np.arange(frames) // block_frames
    return block[:, None] >= block[None, :]


def teacher_forcing_mask(frames: int, block_frames: int) -> np.ndarray:
    """[2F, 2F] for the sequence [clean | noisy]. Blocks of 1, 2 frames (c clean, n noisy):

       c0 c1 n0 n1
    c0  1  .  .  .    clean block b sees clean blocks ≤ b
    c1  1  1  .  .
    n0  .  .  1  .    noisy block b sees clean blocks < b and itself
    n1  1  .  .  1
    """
    block = np.arange(frames) // block_frames
    own, earlier = block[:, None] == block[None, :], block[:, None] > block[None, :]
    return np.block([[own | earlier, np.zeros_like(own)], [earlier, own]])

"""Attention on TPU by JAX's own splash kernel: scores never leave the chip's own memory, forward and backward.

Lengths are padded to whole blocks of the kernel. What every query may see alike (valid frames, no padding) goes in as segment
ids and may be traced; a mask that differs between queries is static, and blocks of which it shows nothing are skipped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128  # a block is a multiple of it
LARGEST = 1024  # tokens of a block: in the backward pass four such squares of scores share the chip's 16 MiB


@jax.tree_util.register_static
class FrameMask(masks.Mask):
    """Static mask [Fq, Fk] of frames, True where a query may look; no array, so it stays static through scans and remat.

    The kernel asks for it block by block; `shape` is then that of the padded tokens, and padding counts as the last frame.
    """

    def __init__(self, frames: np.ndarray, tokens: tuple[int, int] = (1, 1), shape: tuple[int, int] = (0, 0)):
        self.frames, self.tokens, self._shape = np.asarray(frames, bool), tokens, shape

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        (rows, height), (columns, width) = (
            np.unique(np.minimum(np.arange(*part.indices(size)) // tokens, frames - 1), return_counts=True)
            for part, size, tokens, frames in zip(
                block, self.shape, self.tokens, self.frames.shape, strict=True
            )
        )
        return np.repeat(np.repeat(self.frames[np.ix_(rows, columns)], width, axis=1), height, axis=0)

    def _key(self):
        return self.frames.shape, self.frames.tobytes(), self.tokens, self._shape

    def __eq__(self, other) -> bool:
        return isinstance(other, FrameMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def block_size(length: int) -> int:
    """The block that pads a length least, of at most LARGEST tokens; of equals the largest."""
    whole = -(-length // LANES) * LANES
    sizes = range(LARGEST, LARGEST // 2 - 1, -LANES) if whole > LARGEST else [whole]
    return min(sizes, key=lambda size: -length % size)


def flash(q: Array, k: Array, v: Array, mask: Array | FrameMask | None, interpret: bool = False) -> Array:
    """softmax(q·kᵀ)·v of scaled queries q [B, N, A, K]; k, v [B, M, A, K] → [B, N, A, K].

    mask: None; [1, Fk] bool, which key frames count; or a `FrameMask`. A query that sees nothing gets a finite value.
    """
    lengths = queries, keys = q.shape[1], k.shape[1]
    block_q, block_kv = map(block_size, lengths)
    padded = q_len, kv_len = queries + -queries % block_q, keys + -keys % block_kv
    q, k, v = (
        jnp.pad(jnp.swapaxes(a, 1, 2), ((0, 0), (0, 0), (0, size - a.shape[1]), (0, 0)))
        for a, size in ((q, q_len), (k, kv_len), (v, kv_len))
    )
    shown, valid = masks.FullMask(padded), None
    if isinstance(mask, FrameMask):
        tokens = tuple(length // frames for length, frames in zip(lengths, mask.frames.shape, strict=True))
        shown = FrameMask(mask.frames, tokens, padded)
    elif mask is not None:
        assert mask.shape[0] == 1, "a mask that is traced says which keys are there, the same for every query"
        valid = jnp.repeat(mask[0], keys // mask.shape[1])
    if valid is None and kv_len > keys:
        valid = jnp.ones(keys, bool)
    segments = None
    if valid is not None:
        hidden = jnp.pad((~valid).astype(jnp.int32), (0, kv_len - keys), constant_values=1)
        segments = splash.SegmentIds(jnp.zeros(q_len, jnp.int32), hidden)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the kernel's own code
        kernel = _kernel(shown, q.shape[1], block_q, block_kv, interpret)
        out = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return jnp.swapaxes(out[:, :, :queries], 1, 2)


def _kernel(mask: masks.Mask, heads: int, block_q: int, block_kv: int, interpret: bool):
    compute = block_kv // 2 if block_kv % (2 * LANES) == 0 else block_kv  # scores held at a time
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

"""Scaled dot-product attention and the frame-level masks of the causal training forms.

Masks are kept per frame, [query frames, key frames], True where a query may look; tokens of a frame share its row, and no
matrix of tokens is ever made. On TPU a flash kernel runs (`rfjax/flash.py`), on GPU cuDNN's where all queries see the same;
elsewhere scores are made in the open, of some heads and queries at a time.
"""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from rfjax import axes, flash
from rfjax.errors import UserError
from rfjax.flash import FrameMask

MOST_SCORES = 2**26  # held at a time: 256 MiB
CACHED_SCORES = 2**22  # 16 MiB: about what a CPU keeps near, and several times faster than main memory
BACKENDS = {  # and where there is each
    "auto": ("cpu", "gpu", "tpu"),  # what suits platform and numbers
    "xla": ("cpu", "gpu", "tpu"),  # plain products
    "cudnn": ("gpu",),
    "splash": ("tpu",),
}


def check(backend: str, dtype: str, head_dim: int) -> None:
    """UserError where the devices have no such backend, or it does not take heads of this dtype and size."""
    here = axes.platform()
    if here not in BACKENDS[backend]:
        there = ", ".join(name for name, platforms in BACKENDS.items() if here in platforms)
        raise UserError(f"There is no {backend} attention on {here.upper()}; --attention takes {there}.")
    if backend == "cudnn" and not _suits_cudnn(dtype, head_dim):
        raise UserError(
            f"cuDNN's attention takes bfloat16 or float16 and heads of a multiple of 8, at most 128, not {dtype} and {head_dim}; "
            "set config.dit.dtype = 'bfloat16', or give --attention xla."
        )


def attend(
    q: Array, k: Array, v: Array, mask: Array | FrameMask | None = None, backend: str = "auto"
) -> Array:
    """softmax(q·kᵀ / √K)·v. q [B, N, A, K]; k, v [B, M, A, K]. Softmax in float32.

    mask: [Fq or 1, Fk] bool, queries and keys being Fq and Fk frames of equally many tokens; one row is for all queries.
    On TPU a mask of several rows must be static, a `FrameMask`. A query that may look at nothing gets the mean of v, or of v
    and zeros where keys were padded: not NaN, so padded windows stay finite.

    backend: one of BACKENDS that `check` lets pass. cuDNN's serves where all queries see the same; elsewhere plain products do.
    """
    q = q * q.shape[-1] ** -0.5
    backend = chosen(backend, axes.platform(), q.dtype, q.shape[-1])
    if backend == "splash":
        return _per_device(flash.flash, q, k, v, mask)
    if isinstance(mask, FrameMask):
        mask = mask.frames
    if backend == "cudnn" and (mask is None or mask.shape[0] == 1):
        return _per_device(_cudnn, q, k, v, mask)
    return _chunked(q, k, v, mask)


def chosen(backend: str, platform: str, dtype, head_dim: int) -> str:
    """The backend that works on a platform where `backend` is asked for: what "auto" stands for, for heads of this dtype and size.

    All but "xla" are flash kernels, whose scores never lie in memory.
    """
    if backend != "auto":
        return backend
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform == "gpu" and _suits_cudnn(dtype, head_dim) and _from_ampere() else "xla"


def _suits_cudnn(dtype, head_dim: int) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim <= 128 and head_dim % 8 == 0


def _from_ampere() -> bool:
    """Whether the GPU is one for cuDNN's flash attention: NVIDIA's from compute capability 8.0 on. AMD's have names there.

    One that is not here, of which only the memory is asked, is taken to be.
    """
    device = jax.devices()[0]
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform != "gpu" or (major.isdigit() and int(major) >= 8)


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """cuDNN's flash attention of scaled queries. It can leave out keys at the end only, so those that count, [1, Fk], go first."""
    lengths = queries = None
    if mask is not None:
        frames, tokens = mask.shape[1], k.shape[1] // mask.shape[1]
        order, count = jnp.argsort(~jnp.asarray(mask[0]), stable=True), mask.sum(dtype=jnp.int32)
        k, v = (
            einops.rearrange(a, "b (f t) a k -> b f t a k", f=frames)[:, order].reshape(a.shape)
            for a in (k, v)
        )
        count = jnp.where(count > 0, count, frames)  # of none at all it would make no number
        lengths = jnp.full(k.shape[0], tokens, jnp.int32) * count
        queries = (
            q.shape[1] + 0 * lengths
        )  # all of them; said since JAX's own, under vmap, would be of one clip only
    attention = functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation="cudnn")
    return attention(q, k, v, query_seq_lengths=queries, key_value_seq_lengths=lengths)


def _per_device(kernel, q: Array, k: Array, v: Array, mask: Array | FrameMask | None) -> Array:
    """The kernel on each device's share: batch and heads split as `axes.spec` says."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, mask)
    split, whole = axes.spec(q.shape, "batch", None, "heads"), PartitionSpec()
    # The kernel's outputs do not say over which axes they vary, so that check is off.
    shared = jax.shard_map(kernel, in_specs=(split,) * 3 + (whole,), out_specs=split, check_vma=False)
    return shared(q, k, v, mask)


def _chunked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`attend` of scaled queries in plain products, of some heads at a time and of some queries, by how many scores there are."""
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    if mask is not None:  # [N, Fk]
        mask = jnp.repeat(jnp.asarray(mask), q.shape[2] // mask.shape[0], axis=0)
    heads, scores = q.shape[1], q.shape[0] * q.shape[2] * k.shape[2]
    # Heads of a mesh lie on several devices, which work on all of theirs at once.
    fit = CACHED_SCORES if axes.on_one_cpu() else MOST_SCORES
    group = max(
        size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * scores <= fit)
    )
    if group == heads:
        return jnp.swapaxes(_some_queries(q, k, v, mask), 1, 2)
    groups = (einops.rearrange(a, "b (c a) n k -> c b a n k", a=group) for a in (q, k, v))
    out = jax.lax.map(lambda part: _some_queries(*part, mask), tuple(groups))
    return einops.rearrange(out, "c b a n k -> b n (c a) k")


def _some_queries(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`_scores`, where there would be more than MOST_SCORES a chunk of queries at a time."""
    batch, heads, queries, _ = q.shape
    chunk = max(1, MOST_SCORES // (batch * heads * k.shape[2]))
    if queries <= chunk:
        return _scores(q, k, v, mask)
    count = -(-queries // chunk)
    chunk = -(-queries // count)  # evenly, so that next to nothing is padded
    spare = count * chunk - queries
    q = jnp.pad(q, ((0, 0), (0, 0), (0, spare), (0, 0)))
    q = einops.rearrange(q, "b a (c n) k -> c b a n k", c=count)
    if mask is not None:
        mask = jnp.pad(mask, ((0, spare), (0, 0))).reshape(count, chunk, -1)
    # the backward pass makes a chunk's scores anew: kept, they would be all scores again
    out = jax.lax.map(jax.checkpoint(lambda part: _scores(part[0], k, v, part[1])), (q, mask))
    return einops.rearrange(out, "c b a n k -> b a (c n) k")[:, :, :queries]


def _scores(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Scaled queries [B, A, N, K], keys and values [B, A, M, K], mask [N, Fk] → [B, A, N, K]."""
    scores = jnp.einsum("bank,bamk->banm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = jnp.repeat(mask, k.shape[2] // mask.shape[1], axis=1)
        scores = jnp.where(mask[None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    # Dividing [N, K] sums instead of [N, M] weights saves a pass over the scores.
    sums = jnp.einsum("banm,bamk->bank", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (sums / weights.sum(-1, keepdims=True)).astype(v.dtype)


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

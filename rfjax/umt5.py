"""The UMT5 encoder (arXiv 2304.09151), Wan's reader of prompts: T5 1.1 with a relative position bias in every layer.

Shapes: B batch, N tokens, D width, A heads, K = attn_dim / A.
"""

import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax.config import check_dtype
from rfjax.dit import RMSNorm, gelu


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; the defaults are UMT5-XXL's."""

    vocab_size: int = 256384
    dim: int = 4096
    attn_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "float32"  # of activations and matrix products

    def __post_init__(self):
        check_dtype(self.dtype)
        if self.attn_dim % self.num_heads:
            raise ValueError(f"attn_dim {self.attn_dim} must split into {self.num_heads} heads")
        if self.num_buckets % 4:
            raise ValueError(f"num_buckets is {self.num_buckets}; it must be a multiple of 4")


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """[N, N] int32: the bucket of key - query (T5, arXiv 1910.10683, 2.1).

    Half of the buckets are for keys to the right. Of each half, the first half are single distances; the rest grow
    with the logarithm up to max_distance, and the last holds all beyond.
    """
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return (half * (offset > 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class Projection(nn.Dense):
    """Dense without bias."""

    use_bias: bool = False
    kernel_init: Any = nn.initializers.xavier_uniform()


class Block(nn.Module):
    """Self-attention without the 1/√K, then a gated MLP, both on normalised input, on x [B, N, D]."""

    config: UMT5Config

    @nn.compact
    def __call__(self, x: Array, buckets: Array, mask: Array) -> tuple[Array, None]:
        c = self.config
        x = x + self.attention(RMSNorm(c.eps, name="norm1")(x), buckets, mask)
        y = RMSNorm(c.eps, name="norm2")(x)
        gate = gelu(Projection(c.ffn_dim, dtype=c.dtype, name="ffn_gate")(y))
        y = gate * Projection(c.ffn_dim, dtype=c.dtype, name="ffn_in")(y)
        return x + Projection(c.dim, dtype=c.dtype, name="ffn_out")(y), None

    def attention(self, y: Array, buckets: Array, mask: Array) -> Array:
        c = self.config
        q, k, v = (Projection(c.attn_dim, dtype=c.dtype, name=f"attn_{name}")(y) for name in "qkv")
        q, k, v = (einops.rearrange(a, "b n (a k) -> b a n k", a=c.num_heads) for a in (q, k, v))
        bias = self.param("position_bias", nn.initializers.normal(0.02), (c.num_buckets, c.num_heads))
        scores = jnp.einsum("bank,bamk->banm", q, k, preferred_element_type=jnp.float32)
        scores = scores + jnp.moveaxis(bias[buckets], -1, 0)[None].astype(jnp.float32)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        y = einops.rearrange(jnp.einsum("banm,bamk->bank", weights, v), "b a n k -> b n (a k)")
        return Projection(c.dim, dtype=c.dtype, name="attn_o")(y)


class UMT5(nn.Module):
    """`apply(params, ids, mask) → hidden`."""

    config: UMT5Config

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> Array:
        """Features of tokens.

        Args:
          ids: [B, N] int32 tokens.
          mask: [B, N] bool, False for padding: nothing looks at it.

        Returns:
          [B, N, D]. What stands at padding means nothing; `prompt_features` sets it to 0.
        """
        c = self.config
        x = nn.Embed(c.vocab_size, c.dim, dtype=c.dtype, name="token_embedding")(ids)
        buckets = jnp.asarray(relative_buckets(ids.shape[1], c.num_buckets, c.max_distance))
        scan = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
        blocks = nn.scan(Block, in_axes=nn.broadcast, **scan)(c, name="blocks")
        x, _ = blocks(x, buckets, mask)
        return RMSNorm(c.eps, name="norm")(x)


def prompt_features(umt5: UMT5, params, ids: Array, mask: Array) -> Array:
    """[B, N, D] as the transformer's cross-attention wants them: 0 after the prompt's end."""
    mask = jnp.asarray(mask, bool)
    return jnp.where(mask[..., None], umt5.apply({"params": params}, ids, mask), 0)


def init(config: UMT5Config, key: Array) -> dict[str, Any]:
    """Random parameters."""
    return UMT5(config).init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"]

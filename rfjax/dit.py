"""The video diffusion transformer of Wan 2.1 (arXiv 2503.20314): one network for teacher, student and critic.

Bidirectional: no past, no mask. Block-causal and teacher-forcing training: a frame mask. Streaming: a `Past` of cached keys
and values, read by a cache policy. Shapes: B batch, F latent frames, T tokens a frame, D width, A heads, K = D/A, L layers.
On a mesh the batch is split throughout, tokens outside attention and heads inside (`rfjax/axes.py`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax import attention, axes, quantize, rope
from rfjax.config import check_dtype


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network. 1.3B: dim 1536, ffn_dim 8960, num_heads 12, num_layers 30; 14B: 5120, 13824, 40, 40."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int
    in_dim: int = 16
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_base: float = (
        10000.0  # Wan's; a few frames of a few tokens tell their places apart better by a smaller one
    )
    dtype: str = "float32"  # of activations and matrix products, and in sampling of parameters
    linear_dtype: str = ""  # in sampling, "int8" or "float8_e4m3fn": the layers' products in 8 bits
    attention: str = "auto"  # the kernel: what suits the platform, or one of `attention.BACKENDS`
    remat: bool = False  # recompute each layer in the backward pass
    unroll: bool = False  # layers one after another in place of a loop: faster on CPU, longer to compile

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        check_dtype(self.dtype)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} must split into {self.num_heads} heads of even size")
        if self.patch_size[0] != 1:
            raise ValueError("a patch spans one latent frame: patch_size[0] must be 1")
        if self.linear_dtype not in quantize.DTYPES:
            raise ValueError(f"linear_dtype must be one of {quantize.DTYPES}, not {self.linear_dtype!r}")
        if self.attention not in attention.BACKENDS:
            raise ValueError(
                f"attention must be one of {', '.join(attention.BACKENDS)}, not {self.attention!r}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class KV(NamedTuple):
    """Keys (normalised, not rotated) and values of every layer, each [L, B, tokens, A, K]."""

    k: Array
    v: Array


class Past(NamedTuple):
    """What a cache policy lets a window see besides itself: P frames, in blocks of N tokens.

    Every layer picks its own out of the whole cache, so that no copy of all layers is ever made.
    """

    kv: KV  # [L, B, slots, N, A, K], plain or quantised
    slots: Array  # [P·T / N] int32, which slots are seen, in order
    positions: Array  # [P] int32, latent frame positions, in the window's terms
    valid: Array | None  # [P] bool; None when every frame is valid


def seen(kv: KV, slots: Array) -> KV:
    """The blocks in these slots [S], one after another: k, v [..., slots, N, A, K] → [..., S·N, A, K].

    By slices, not a gather, for which XLA would copy the whole cache to a layout that it likes better.
    """

    def pick(a):
        none = a[..., 0, :0, :, :]  # where no slot is seen
        blocks = (jax.lax.dynamic_index_in_dim(a, slot, a.ndim - 4, keepdims=False) for slot in slots)
        return jnp.concatenate([none, *blocks], axis=-3)

    return jax.tree.map(pick, kv)


def timestep_embedding(t: Array, dim: int) -> Array:
    """Sinusoid [cos | sin] of t [...] → [..., dim], float32, base 10000."""
    half = dim // 2
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    angles = t.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * t.ndim + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class Linear(nn.Dense):
    """Dense whose initialisation keeps the variance of its input (Xavier), and whose kernel may be quantised."""

    kernel_init: Any = nn.initializers.xavier_uniform()
    promote_dtype: Any = quantize.promote
    dot_general: Any = quantize.dot_general


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return (x32 * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def layer_norm(x: Array, eps: float) -> Array:
    """(x - mean) / std over the last axis, in float32, without learned scale."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)


class LayerNorm(nn.Module):
    """`layer_norm` with learned scale and bias, which may be of any dtype. In float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (a.astype(jnp.float32).reshape(shape) for a in (scale, bias))
        return layer_norm(x, self.eps) * scale + bias


def gelu(x: Array) -> Array:
    """GELU by tanh (arXiv 1606.08415). Products in place of x³ make its backward pass a fifth faster on CPU."""
    return 0.5 * x * (1 + jnp.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


def settle(x: Array) -> Array:
    """x, and its gradient, made once and kept, in training on CPU (`compilation.training_step`).

    XLA fuses the sums of the residual stream into all that reads them, so that each layer would add up those before it anew.
    """
    return jax.lax.optimization_barrier(x) if axes.platform() == "cpu" else x


def split_heads(x: Array, heads: int) -> Array:
    """[B, F, T, D] with tokens over context → [B, F·T, A, K] with heads over context: one all-to-all."""
    x = axes.constrain(x, "batch", None, "tokens")
    x = einops.rearrange(x, "b f t (a k) -> b f t a k", a=heads)
    x = axes.constrain(x, "batch", None, None, "heads")
    return einops.rearrange(x, "b f t a k -> b (f t) a k")


def join_heads(x: Array, frames: int) -> Array:
    """[B, F·T, A, K] → [B, F, T, D]: the all-to-all back."""
    x = axes.constrain(x, "batch", None, "heads")
    x = einops.rearrange(x, "b (f t) a k -> b f t a k", f=frames)
    x = axes.constrain(x, "batch", None, "tokens")
    return einops.rearrange(x, "b f t a k -> b f t (a k)")


class TextKV(nn.Module):
    """Cross-attention keys and values of one layer: they depend on the prompt only."""

    config: DiTConfig

    @nn.compact
    def __call__(self, _, text: Array) -> tuple[None, KV]:
        c = self.config
        k = RMSNorm(c.eps, name="norm_k")(Linear(c.dim, dtype=c.dtype, name="k")(text))
        v = Linear(c.dim, dtype=c.dtype, name="v")(text)
        return None, KV(*(split_heads(a[:, None], c.num_heads) for a in (k, v)))


class Scene(NamedTuple):
    """What all layers share: modulation of each frame, rotations of window and past, slots of the past, and the mask."""

    e6: Array  # [B, F, 6, D]
    window: rope.Rotation
    past: rope.Rotation | None
    slots: Array | None
    mask: Array | attention.FrameMask | None  # [F or 1, P + F], of frames


class Block(nn.Module):
    """Self-attention over [past | window], cross-attention to the text, MLP; all on x [B, F, T, D]."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Array, text_kv: KV, past: KV | None, scene: Scene) -> tuple[Array, KV]:
        c = self.config
        modulation = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (6, c.dim))
        e6 = jnp.moveaxis(scene.e6 + modulation.astype(jnp.float32)[None, None], 2, 0)[:, :, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = e6

        y = (layer_norm(x, c.eps) * (1 + scale1) + shift1).astype(c.dtype)
        y, kv = self.self_attention(y, past, scene)
        x = settle(x + (gate1 * y.astype(jnp.float32)).astype(x.dtype))
        y = LayerNorm(c.eps, name="norm3")(x)
        x = settle(x + self.cross_attention(y.astype(c.dtype), text_kv))
        y = (layer_norm(x, c.eps) * (1 + scale2) + shift2).astype(c.dtype)
        y = gelu(Linear(c.ffn_dim, dtype=c.dtype, name="ffn_in")(y))
        y = Linear(c.dim, dtype=c.dtype, name="ffn_out")(y)
        x = settle(x + (gate2 * y.astype(jnp.float32)).astype(x.dtype))
        return axes.constrain(x, "batch", None, "tokens"), kv

    def self_attention(self, y: Array, past: KV | None, scene: Scene) -> tuple[Array, KV]:
        c, frames = self.config, y.shape[1]
        q = RMSNorm(c.eps, name="self_norm_q")(Linear(c.dim, dtype=c.dtype, name="self_q")(y))
        k = RMSNorm(c.eps, name="self_norm_k")(Linear(c.dim, dtype=c.dtype, name="self_k")(y))
        v = Linear(c.dim, dtype=c.dtype, name="self_v")(y)
        q, k, v = (split_heads(a, c.num_heads) for a in (q, k, v))
        if past is not None:
            past = KV(*(quantize.plain(a, c.dtype) for a in seen(past, scene.slots)))
            past = KV(rope.apply(past.k, scene.past), past.v)
        y = self.look(rope.apply(q, scene.window), KV(rope.apply(k, scene.window), v), past, scene)
        return Linear(c.dim, dtype=c.dtype, name="self_o")(join_heads(y, frames)), KV(k, v)

    def look(self, q: Array, own: KV, past: KV | None, scene: Scene) -> Array:
        """Attention of the window's queries over the past and the window itself, keys and queries rotated."""
        kv = own if past is None else jax.tree.map(lambda *pair: jnp.concatenate(pair, 1), past, own)
        return attention.attend(q, kv.k, kv.v, scene.mask, self.config.attention)

    def cross_attention(self, y: Array, text_kv: KV) -> Array:
        c, frames = self.config, y.shape[1]
        q = RMSNorm(c.eps, name="cross_norm_q")(Linear(c.dim, dtype=c.dtype, name="cross_q")(y))
        y = attention.attend(split_heads(q, c.num_heads), text_kv.k, text_kv.v, None, c.attention)
        return Linear(c.dim, dtype=c.dtype, name="cross_o")(join_heads(y, frames))


class DiT(nn.Module):
    """`apply(params, x, t, text_kv, positions, past, mask) → (flow, kv)`, and `text_kv(context)` once a prompt."""

    config: DiTConfig

    def setup(self):
        c = self.config
        self.patch_embedding = Linear(c.dim, dtype=c.dtype)
        # Float32 in fact: by default a TPU rounds factors to bfloat16, and a GPU to TF32.
        exact = dict(dtype="float32", precision="highest")
        self.time_in, self.time_out = Linear(c.dim, **exact), Linear(c.dim, **exact)
        self.time_projection = Linear(6 * c.dim, **exact)
        self.text_in, self.text_out = Linear(c.dim, dtype=c.dtype), Linear(c.dim, dtype=c.dtype)
        scan = dict(
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            unroll=c.num_layers if c.unroll else 1,
            check_constancy_invariants=False,  # it would trace every layer once more, and nothing here is broadcast out
        )
        self.text_layers = nn.scan(TextKV, in_axes=nn.broadcast, **scan)(c)
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        self.blocks = nn.scan(block, in_axes=(0, 0, nn.broadcast), **scan)(c)
        self.head_modulation = self.param("head_modulation", nn.initializers.normal(c.dim**-0.5), (2, c.dim))
        features = int(np.prod(c.patch_size)) * c.in_dim
        self.head = nn.Dense(features, kernel_init=nn.initializers.zeros, **exact)

    def text_kv(self, context: Array) -> KV:
        """Text keys and values of every layer from padded embeddings [B, text_len, text_dim]: k, v [L, B, text_len, A, K]."""
        context = axes.constrain(context.astype(self.config.dtype), "batch", "tokens")
        text = self.text_out(gelu(self.text_in(context)))
        return self.text_layers(None, text)[1]

    def __call__(
        self,
        x: Array,
        t: Array,
        text_kv: KV,
        positions: Array,
        past: Past | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, KV]:
        """Flow of a window of noisy frames.

        Args:
          x: [B, F, H, W, C] noisy latents.
          t: [B, F] timesteps, 1000·σ; 0 means clean.
          text_kv: from `text_kv`, [L, B, text_len, A, K].
          positions: [F] int32 latent frame positions of the window. Only differences matter.
          past: cached keys and values that the window may see.
          mask: [F or 1, F] bool, which frames of the window see which (one row: all the same); None = all. A numpy mask
            is static, as attention on TPU wants one of several rows.

        Returns:
          The flow [B, F, H, W, C] in float32, and the window's own keys and values [L, B, F·T, A, K].
        """
        c = self.config
        _, frames, height, width, _ = x.shape
        rows, columns = height // c.patch_size[1], width // c.patch_size[2]
        patches = "b f (h p) (w q) c -> b f (h w) (p q c)"
        sizes = dict(p=c.patch_size[1], q=c.patch_size[2])
        tokens = self.patch_embedding(einops.rearrange(x, patches, **sizes).astype(c.dtype))
        tokens = axes.constrain(tokens, "batch", None, "tokens")

        e = self.time_out(nn.silu(self.time_in(timestep_embedding(t, c.freq_dim))))  # [B, F, D]
        e6 = einops.rearrange(self.time_projection(nn.silu(e)), "b f (n d) -> b f n d", n=6)
        e6 = axes.constrain(e6, "batch")
        scene = self._scene(e6, positions, rows, columns, past, mask)
        tokens, kv = self.blocks(tokens, text_kv, past.kv if past else None, scene)

        modulation = self.head_modulation.astype(jnp.float32)
        shift, scale = jnp.moveaxis(e[:, :, None] + modulation[None, None], 2, 0)[:, :, :, None]
        out = self.head(layer_norm(tokens, c.eps) * (1 + scale) + shift)
        unpatch = "b f (h w) (p q c) -> b f (h p) (w q) c"
        flow = einops.rearrange(out, unpatch, h=rows, w=columns, **sizes).astype(jnp.float32)
        return axes.constrain(flow, "batch"), kv

    def _scene(self, e6, positions, rows, columns, past, mask) -> Scene:
        # Positions are taken relative to the window's first frame while they are still integers, so float32 angles are as
        # exact at frame 1,000,000 as at frame 0.
        origin, frames = positions[0], positions.shape[0]
        rotation = functools.partial(
            rope.rotation,
            height=rows,
            width=columns,
            head_dim=self.config.head_dim,
            base=self.config.rope_base,
        )
        window = rotation(positions - origin)
        past_rotation = rotation(past.positions - origin) if past else None
        if past is not None and (past.valid is not None or mask is not None):
            valid = jnp.ones(past.positions.shape, bool) if past.valid is None else past.valid
            own = jnp.ones((1, frames), bool) if mask is None else jnp.asarray(mask)
            mask = jnp.concatenate([jnp.broadcast_to(valid, (own.shape[0], valid.shape[0])), own], 1)
        if isinstance(mask, np.ndarray):  # static, and static it stays through the scan over layers
            mask = attention.FrameMask(mask)
        return Scene(e6, window, past_rotation, past.slots if past else None, mask)


def init(config: DiTConfig, key: Array) -> dict[str, Any]:
    """Random parameters, those of `text_kv` included."""

    def every_part(dit, x, context):
        return dit(x, jnp.zeros(x.shape[:2]), dit.text_kv(context), jnp.arange(x.shape[1]))

    x = jnp.zeros((1, *config.patch_size, config.in_dim))
    context = jnp.zeros((1, config.text_len, config.text_dim))
    dit = DiT(dataclasses.replace(config, attention="xla"))  # which a machine without the kernel can trace
    return dit.init(key, x, context, method=every_part)["params"]

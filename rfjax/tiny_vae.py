"""The decoder of TAEHV (github.com/madebyollin/taehv), a stand-in for the Wan VAE's: same latents, a hundredth of the cost.

Latents [B, f, h, w, 16], normalised as the transformer makes them → video [B, F, 8h, 8w, 3] in [-1, 1]; F = 1 + 4 (f - 1) for a
clip from its start, 4 f for what follows. Each memory block sees the frame before, which is its past; so any chunking is the whole.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from rfjax.config import check_dtype
from rfjax.conv import FrameConv, upsample2x, with_past

BLOCKS = 3  # memory blocks of a level


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes of the decoder; the defaults are those of taew2_1."""

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)  # of each level, and after the last
    temporal_upsample: tuple[bool, ...] = (False, True, True)
    dtype: str = "float32"  # of parameters and activations when sampling

    def __post_init__(self):
        for name in ("widths", "temporal_upsample"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_dtype(self.dtype)


class MemoryBlock(nn.Module):
    """relu(x + three convolutions of [x, the frame before]): x [B, F, H, W, C], past [B, 1, H, W, C] or None → (y, next past)."""

    features: int

    @nn.compact
    def __call__(self, x: Array, past: Array | None) -> tuple[Array, Array]:
        before = with_past(x, past, 1)[:, :-1]
        y = nn.relu(FrameConv(self.features, name="conv1")(jnp.concatenate([x, before], -1)))
        y = nn.relu(FrameConv(self.features, name="conv2")(y))
        return nn.relu(x + FrameConv(self.features, name="conv3")(y)), x[:, -1:]


class TinyDecoder(nn.Module):
    """`apply(params, latents, past) → (video, next past)`; past is None at the start of a clip."""

    config: TinyVAEConfig

    @nn.compact
    def __call__(self, latents: Array, past: tuple | None = None) -> tuple[Array, tuple]:
        c, following = self.config, []
        x = nn.relu(FrameConv(c.widths[0], name="conv_in")(3 * jnp.tanh(latents / 3)))
        pasts = iter(past or (None,) * BLOCKS * len(c.temporal_upsample))
        for level, doubles in enumerate(c.temporal_upsample):
            for block in range(BLOCKS):
                x, memory = MemoryBlock(c.widths[level], name=f"memory_{level}_{block}")(x, next(pasts))
                following.append(memory)
            x = self._grow(upsample2x(x), 1 + doubles, level)
            x = FrameConv(c.widths[level + 1], use_bias=False, name=f"conv_{level}")(x)
        video = jnp.clip(FrameConv(3, name="conv_out")(nn.relu(x)), 0, 1) * 2 - 1
        # Latent frame 0 is one video frame: of the frames that it gives, the last.
        return video if past else video[:, 2 ** sum(c.temporal_upsample) - 1 :], tuple(following)

    def decode_normalised(self, latents: Array, past: tuple | None = None) -> tuple[Array, tuple]:
        """The same, in the dtype of config."""
        return self(latents.astype(self.config.dtype), past)

    def _grow(self, x: Array, factor: int, level: int) -> Array:
        """[B, F, H, W, C] → [B, factor·F, H, W, C]: a linear map makes `factor` frames of each."""
        batch, frames, height, width, channels = x.shape
        x = nn.Dense(factor * channels, use_bias=False, name=f"grow_{level}")(x)
        x = jnp.moveaxis(x.reshape(batch, frames, height, width, factor, channels), 4, 2)
        return x.reshape(batch, factor * frames, height, width, channels)

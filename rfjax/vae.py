"""Wan 2.1 video VAE (arXiv 2503.20314): causal in time, so a stream decodes to the frames of the whole clip.

Video [B, F, H, W, 3] in [-1, 1] <-> latents [B, f, h, w, z], channels last. With the default configuration
H = 8 h, W = 8 w and F = 1 + 4 (f - 1): latent frame 0 is one video frame, each later one is four.

Every layer maps (x, past) -> (y, next past). `past` is what the layer remembers of earlier chunks, `None` at
the start of a clip and `()` when it remembers nothing; a network's past is the tuple of its layers' pasts.
Running a whole clip is the one-chunk case: parallel over time, the next past unused.

On a mesh each device has whole clips: the transformer's split of tokens would reach in here as one of height, and convolutions
that XLA splits so gave other numbers than one device.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rfjax import attention, axes
from rfjax.config import check_dtype
from rfjax.conv import CausalConv, FrameConv, RMSNorm, copy_present, upsample2x, with_past
from rfjax.errors import UserError

# A stream whose frames have so many numbers or more at the decoder's finest level makes them one by one: a MiB, of float32.
LARGE = 2**18


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are Wan 2.1's, whose `dim` is 96."""

    dim: int
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    dtype: str = "float32"  # of parameters and activations when sampling

    def __post_init__(self):
        for name in ("dim_mult", "temporal_downsample"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_dtype(self.dtype)
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"vae.temporal_downsample has {len(self.temporal_downsample)} entries; "
                f"give one for each of the {len(self.dim_mult) - 1} steps between the levels of vae.dim_mult."
            )

    @property
    def spatial_stride(self) -> int:
        """Video pixels per latent pixel, along height and along width."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, after the first."""
        return 2 ** sum(self.temporal_downsample)


def latent_size(config: VAEConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (frames, height, width) of a video; UserError with the nearest legal sizes if none."""
    ts, s = config.temporal_stride, config.spatial_stride
    legal = (
        1 + ts * max(0, round((frames - 1) / ts)),
        s * max(1, round(height / s)),
        s * max(1, round(width / s)),
    )
    if legal != (frames, height, width):
        raise UserError(
            f"a video of {frames} frames of {height}x{width} has no latent size: "
            f"frames must be 1 + a multiple of {ts}, "
            f"height and width multiples of {s}; the nearest is {legal[0]} frames of {legal[1]}x{legal[2]}."
        )
    return 1 + (frames - 1) // ts, height // s, width // s


def chain(layers, x, past):
    """Run layers in order, each with its own past: (x, tuple of pasts or None) -> (y, next pasts)."""
    following = []
    for layer, its_past in zip(layers, past or (None,) * len(layers), strict=True):
        x, its_next = layer(x, its_past)
        following.append(its_next)
    return x, tuple(following)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear shortcut when the channels change."""

    features: int

    @nn.compact
    def __call__(self, x, past=None):
        past1, past2 = past or (None, None)
        y, past1 = CausalConv(self.features, name="conv1")(nn.silu(RMSNorm(name="norm1")(x)), past1)
        y, past2 = CausalConv(self.features, name="conv2")(nn.silu(RMSNorm(name="norm2")(y)), past2)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="shortcut")(x)
        return x + y, (past1, past2)


class AttentionBlock(nn.Module):
    """Single-head self-attention inside each frame."""

    @nn.compact
    def __call__(self, x, past=None):
        qkv = nn.Dense(3 * x.shape[-1], name="to_qkv")(RMSNorm(name="norm")(x))
        pixels = qkv.reshape((-1, x.shape[2] * x.shape[3], 1, qkv.shape[-1]))  # [B·F, H·W, one head, 3C]
        y = attention.attend(*jnp.split(pixels, 3, -1)).reshape(x.shape)
        return x + nn.Dense(x.shape[-1], name="proj")(y), ()


class Downsample(nn.Module):
    """Halve height and width, and with `temporal` the frames too; a clip's first frame stands alone."""

    temporal: bool

    @nn.compact
    def __call__(self, x, past=None):
        x = FrameConv(x.shape[-1], stride=2, name="resample")(x)
        if not self.temporal:
            return x, ()
        following = x[:, -1:]
        # Kernel 3, stride 2, no padding: each output sees the frame before its pair. Its taps go side by side
        # into one linear map, whose kernel is the time convolution's [3, C, C] flattened.
        seen = x if past is None else with_past(x, past)
        first = x[:, :0] if past is not None else x[:, :1]
        taps = jnp.concatenate([seen[:, :-2:2], seen[:, 1:-1:2], seen[:, 2::2]], -1)
        return jnp.concatenate(
            [first, nn.Dense(x.shape[-1], kernel_init=copy_present, name="time_conv")(taps)], 1
        ), following


class Upsample(nn.Module):
    """Double height and width, halve the channels; with `temporal` double all frames but the first."""

    temporal: bool

    @nn.compact
    def __call__(self, x, past=None):
        following = ()
        if self.temporal:
            # The clip's first frame is neither doubled nor seen by the time convolution.
            first, rest = (x[:, :1], x[:, 1:]) if past is None else (x[:, :0], x)
            rest, following = self.double_frames(rest, past, like=x)
            x = jnp.concatenate([first, rest], 1)
        return FrameConv(x.shape[-1] // 2, name="resample")(upsample2x(x)), following

    def double_frames(self, x, past, like):
        b, f, h, w, c = x.shape
        taps = with_past(x, jnp.zeros_like(like[:, :1]).repeat(2, 1) if past is None else past)
        stacked = jnp.concatenate([taps[:, k : k + f] for k in range(3)], -1)
        pairs = nn.Dense(2 * c, kernel_init=copy_present, name="time_conv")(stacked).reshape(
            (b, f, h, w, 2, c)
        )
        return jnp.moveaxis(pairs, 4, 2).reshape((b, 2 * f, h, w, c)), taps[:, -2:]


class Encoder(nn.Module):
    config: VAEConfig

    def setup(self):
        c = self.config
        self.conv1 = CausalConv(c.dim)
        layers = []
        for level, mult in enumerate(c.dim_mult):
            layers += [ResidualBlock(c.dim * mult) for _ in range(c.num_res_blocks)]
            if level < len(c.temporal_downsample):
                layers.append(Downsample(c.temporal_downsample[level]))
        self.downsamples = layers
        self.middle = [
            ResidualBlock(c.dim * c.dim_mult[-1]),
            AttentionBlock(),
            ResidualBlock(c.dim * c.dim_mult[-1]),
        ]
        self.norm = RMSNorm()
        self.head = CausalConv(2 * c.z_dim)

    def __call__(self, x, past=None):
        body, head = past or (None, None)
        x, body = chain([self.conv1, *self.downsamples, *self.middle], x, body)
        x, head = self.head(nn.silu(self.norm(x)), head)
        return x, (body, head)


class Decoder(nn.Module):
    config: VAEConfig

    def setup(self):
        c = self.config
        top = c.dim * c.dim_mult[-1]
        self.conv1 = CausalConv(top)
        self.middle = [ResidualBlock(top), AttentionBlock(), ResidualBlock(top)]
        layers = []
        doubling = c.temporal_downsample[::-1]
        for level, mult in enumerate(c.dim_mult[::-1]):
            layers += [ResidualBlock(c.dim * mult) for _ in range(c.num_res_blocks + 1)]
            if level < len(doubling):
                layers.append(Upsample(doubling[level]))
        self.upsamples = layers
        self.norm = RMSNorm()
        self.head = CausalConv(3)

    def __call__(self, x, past=None):
        height, width = (x.shape[axis] * self.config.spatial_stride for axis in (2, 3))
        if past is None or x.shape[1] > 1 or height * width * self.config.dim < LARGE:
            return chain(self.layers, x, past)
        return self.one_by_one(x, past)

    @property
    def layers(self):
        return [self.conv1, *self.middle, *self.upsamples, self.finish]

    def finish(self, x, past):
        return self.head(nn.silu(self.norm(x)), past)

    def one_by_one(self, x, past, first=0):
        """As `chain` with the layers from `first` on, x [B, 1, h, w, C]; but from a layer that doubles them on, frame by frame.

        So memory holds one frame of the finest level in place of four.
        """
        x, mine = self.layers[first](x, past[0])
        if not (later := past[1:]):
            return x, (mine,)
        if x.shape[1] == 1:
            x, later = self.one_by_one(x, later, first + 1)
        else:
            rest = nn.scan(
                lambda decoder, past, frame: decoder.one_by_one(frame, past, first + 1)[::-1],
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            later, x = rest(self, later, jnp.moveaxis(x, 1, 0)[:, :, None])  # [F, B, m, H, W, 3]
            x = jnp.concatenate(list(x), 1)
        return x, (mine, *later)


class VAE(nn.Module):
    """The Wan VAE. Arithmetic follows the dtype of parameters and inputs; norms' statistics are float32."""

    config: VAEConfig

    def setup(self):
        z = self.config.z_dim
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.conv1 = nn.Dense(2 * z)
        self.conv2 = nn.Dense(z)
        self.latent_mean = self.param("latent_mean", nn.initializers.zeros, (z,))
        self.latent_std = self.param("latent_std", nn.initializers.ones, (z,))

    def __call__(self, video):
        """video [B, F, H, W, 3] -> (reconstruction, mean, logvar), through the whole network."""
        mean, logvar = self.encode(video)
        return self.decode(mean), mean, logvar

    def encode(self, video):
        """video [B, F, H, W, 3] -> (mean, logvar) of raw latents [B, f, h, w, z]; UserError on a bad size."""
        latent_size(self.config, *video.shape[1:4])
        mean, logvar, _ = self.encode_step(video)
        return mean, logvar

    def encode_step(self, video, state=None):
        """The next chunk: 1 + 4 (n - 1) frames first (state None), 4 n later -> (mean, logvar, state)."""
        hidden, state = self.encoder(axes.constrain(video, "batch"), state)
        return *jnp.split(axes.constrain(self.conv1(hidden), "batch"), 2, -1), state

    def decode(self, latents):
        """Raw latents [B, f, h, w, z] -> video [B, 1 + 4 (f - 1), 8 h, 8 w, 3], not clamped."""
        return self.decode_step(latents)[0]

    def decode_step(self, latents, state=None):
        """The next chunk of a clip: raw latents [B, n, h, w, z] -> (video, state).

        With state None the clip starts and the chunk gives 1 + 4 (n - 1) frames; with the state that the
        previous chunk returned it gives 4 n. Any chunking gives the frames of `decode`. The state is a
        pytree of arrays whose shapes do not depend on n.
        """
        video, state = self.decoder(self.conv2(axes.constrain(latents, "batch")), state)
        return axes.constrain(video, "batch"), state

    def decode_normalised(self, latents, state=None):
        """`decode_step` of the diffusion model's latents, in the dtype of config."""
        raw = self.denormalise(latents.astype(jnp.float32)).astype(self.config.dtype)
        return self.decode_step(raw, state)

    def encode_normalised(self, video, state=None):
        """`encode_step` to the diffusion model's latents, in the dtype of config: (latents, state)."""
        mean, _, state = self.encode_step(video.astype(self.config.dtype), state)
        return self.normalise(mean.astype(jnp.float32)), state

    def _statistics(self):
        mean, std = jax.lax.stop_gradient((self.latent_mean, self.latent_std))
        return mean.reshape((1, 1, 1, 1, -1)), std.reshape((1, 1, 1, 1, -1))

    def normalise(self, latents):
        """Raw latents [B, f, h, w, z] -> the diffusion model's, zero mean and unit variance per channel."""
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalise(self, latents):
        """Inverse of `normalise`."""
        mean, std = self._statistics()
        return latents * std + mean

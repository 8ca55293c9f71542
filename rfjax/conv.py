"""Causal video convolutions, channels last, that carry their own past.

A causal convolution over time sees two earlier frames. They come from `past`, the last two input frames of
the previous chunk, so that running chunk by chunk gives the same numbers as running over the whole clip;
`past=None` starts a clip with zeros.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

# At or below so many channels on one side, the three time taps are stacked on that side's channel axis and
# run as one convolution: a CPU convolution with so few channels wastes most of its vector width.
THIN_IN, THIN_OUT = 16, 4


def conv2d(x, kernel, stride=1, padding="SAME"):
    """2-D convolution of every frame: x [B, F, H, W, I], kernel [kh, kw, I, O] -> [B, F, H', W', O]."""
    frames = x.reshape((-1, *x.shape[2:]))
    y = lax.conv_general_dilated(
        frames, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape((*x.shape[:2], *y.shape[1:]))


def causal_conv(x, kernel):
    """Causal 3-D convolution: x [B, 2 + F, H, W, I], kernel [3, kh, kw, I, O] -> [B, F, H, W, O].

    The same sum as one 3-D convolution, taken as 2-D convolutions of time-shifted inputs, which run several
    times faster on CPU, forward and backward.
    """
    frames = x.shape[1] - 2
    taps = [x[:, k : k + frames] for k in range(3)]
    inputs, outputs = kernel.shape[-2:]
    if inputs <= THIN_IN:
        return conv2d(jnp.concatenate(taps, -1), jnp.concatenate(list(kernel), -2))
    if outputs <= THIN_OUT:
        parts = jnp.split(conv2d(x, jnp.concatenate(list(kernel), -1)), 3, -1)
        return sum(part[:, k : k + frames] for k, part in enumerate(parts))
    return sum(conv2d(tap, kernel[k]) for k, tap in enumerate(taps))


def with_past(x, past, frames=2):
    """Put the past in front of x [B, F, H, W, C]; zeros when the clip starts here."""
    if past is None:
        past = jnp.zeros_like(x[:, :1]).repeat(frames, 1)
    return jnp.concatenate([past, x], 1)


def _bias(module, features, ndim):
    return module.param("bias", nn.initializers.zeros, (features,)).reshape((1,) * (ndim - 1) + (features,))


_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def present_only(key, shape, dtype=jnp.float32):
    """First kernel [3, h, w, I, O] that looks at the present frame alone: what single images teach then holds for clips."""
    return jnp.zeros(shape, dtype).at[-1].set(_kernel_init(key, shape[1:], dtype))


def copy_present(key, shape, dtype=jnp.float32):
    """First kernel [3·C, n·C] of a map from three stacked frames that gives n copies of the last one."""
    del key
    channels = shape[0] // 3
    copies = jnp.tile(jnp.eye(channels, dtype=dtype), (1, shape[1] // channels))
    return jnp.zeros(shape, dtype).at[-channels:].set(copies)


class CausalConv(nn.Module):
    """(x [B, F, H, W, I], past [B, 2, H, W, I] or None) -> (y [B, F, H, W, features], next past)."""

    features: int
    window: tuple[int, int] = (3, 3)

    @nn.compact
    def __call__(self, x, past=None):
        kernel = self.param("kernel", present_only, (3, *self.window, x.shape[-1], self.features))
        x = with_past(x, past)
        return causal_conv(x, kernel) + _bias(self, self.features, x.ndim), x[:, -2:]


class FrameConv(nn.Module):
    """3x3 convolution of every frame: x [B, F, H, W, I] -> [B, F, H', W', features]."""

    features: int
    stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", _kernel_init, (3, 3, x.shape[-1], self.features))
        # A strided convolution pads only the right and the bottom edge.
        padding = "SAME" if self.stride == 1 else ((0, 1), (0, 1))
        y = conv2d(x, kernel, self.stride, padding)
        return y + _bias(self, self.features, x.ndim) if self.use_bias else y


class RMSNorm(nn.Module):
    """x / |x| · sqrt(C) · gamma over the last axis, statistics in float32.

    A zero vector stays zero and passes no gradient back; 1 / |x| there would overflow within a few layers.
    """

    @nn.compact
    def __call__(self, x):
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],)).reshape((1,) * (x.ndim - 1) + (-1,))
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        square = square / x.shape[-1]
        scale = jnp.where(square > 1e-24, lax.rsqrt(jnp.maximum(square, 1e-24)), 0)
        return x * scale.astype(x.dtype) * gamma


def upsample2x(x):
    """Nearest-neighbour doubling of height and width: [B, F, H, W, C] -> [B, F, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)

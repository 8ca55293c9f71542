"""Floating-point operations of the transformer in closed form: the same on every backend, whatever its kernels do.

A product of [n, a] and [a, b] counts 2·n·a·b. A call on n tokens of width D that attends to m keys and to W words takes, a layer,

    n · (12 D² + 4 D · ffn_dim)      four products of self-attention, two of cross-attention, two of the MLP
    + 4 n m D + 4 n W D              scores and their sums of values

(the words' own keys and values are made once a prompt). Normalisations, softmax and rotations are left out, as is usual.
"""

from math import prod

from rfjax.dit import DiTConfig
from rfjax.rollout import RolloutConfig


def parts(c: DiTConfig, frames: int, tokens: int, keys: int) -> dict[str, float]:
    """Of one clip, by part: a call on `frames` frames of `tokens` tokens that attend to `keys` tokens, their own included."""
    n, patch = frames * tokens, prod(c.patch_size) * c.in_dim
    layer = {
        "q, k, v, out": 8 * n * c.dim**2,
        "self-attention": 4 * n * keys * c.dim,
        "text: q, out": 4 * n * c.dim**2,
        "text: attention": 4 * n * c.text_len * c.dim,
        "MLP": 4 * n * c.dim * c.ffn_dim,
    }
    ends = {
        "patches in, out": 2 * n * 2 * patch * c.dim,
        "time": 2 * frames * (c.freq_dim * c.dim + 7 * c.dim**2),  # one embedding and modulation a frame
    }
    return {name: float(c.num_layers * count) for name, count in layer.items()} | ends


def call(c: DiTConfig, frames: int, tokens: int, keys: int) -> float:
    """The sum of `parts`."""
    return float(sum(parts(c, frames, tokens, keys).values()))


def block(c: DiTConfig, roll: RolloutConfig, method: str, tokens: int, clips: int) -> dict[str, float]:
    """Of the steady state: one window (or step of a block), one clean call, and all that a block takes ("step").

    Every call of the steady state attends to `span_blocks` blocks.
    """
    keys = roll.span_blocks * roll.block_frames * tokens
    blocks, windows = (roll.num_steps, 1) if method == "rolling" else (1, roll.num_steps)
    window = clips * call(c, blocks * roll.block_frames, tokens, keys)
    clean = clips * call(c, roll.block_frames, tokens, keys)
    return {"window": window, "clean": clean, "step": windows * window + clean}

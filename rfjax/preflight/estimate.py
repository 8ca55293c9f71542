"""The memory that sampling needs on any device, counted without compiling anything.

Parameters, cache and the decoder's past are counted exactly, from abstract shapes. What a step needs besides is a sum of the arrays
alive at its peak, calibrated against the compilers' own counts: XLA's for CPU, from the tests' sizes to Wan 1.3B at 832x480, and
libtpu's for v5e and v6e at that size. It is never below these and at most 1.7 times as much. On CPU, 16-bit operands are widened to
float32 and attention's scores are made in the open; a TPU does neither. A GPU with cuDNN's attention counts as one: none was tried.
"""

import bisect
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rfjax import attention, axes, config, dit, parameters, rollout, sampler
from rfjax.errors import UserError
from rfjax.tiny_vae import TinyDecoder, TinyVAEConfig
from rfjax.vae import VAE, VAEConfig

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # versions 2 and 1
GIB = 2**30
WIDE = 4  # bytes of a number in products and softmax on CPU, whatever the parameters are kept in
SPARE = 1.1  # what is lost between arrays, and the many small ones
Decoder = VAEConfig | TinyVAEConfig


class Need(NamedTuple):
    """Bytes on the device. The text encoder runs on the host and is not counted."""

    parameters: int  # of the transformer and of the decoder in use
    cache: int  # keys and values of past blocks and of the prompts, and the window
    window: int  # the most that one step of the stream needs besides
    decoder: (
        int  # its past, and the most that decoding one block needs besides, on accelerators beyond a step
    )

    @property
    def total(self) -> int:
        """The sum: on CPU a block may be decoded while the next is under way; accelerators do one after the other."""
        return sum(self)


class _Plan(NamedTuple):
    platform: str
    method: str
    clips: int
    grid: tuple[int, int]  # rows and columns of patches
    network: dit.DiTConfig
    vae: VAEConfig
    tiny: TinyVAEConfig | None  # where the config has it, in use or not
    decoder: Decoder
    roll: rollout.RolloutConfig

    @property
    def latent(self) -> tuple[int, int]:
        return self.grid[0] * self.network.patch_size[1], self.grid[1] * self.network.patch_size[2]

    @property
    def words(self) -> tuple[str, str]:
        height, width = (side * self.vae.spatial_stride for side in self.latent)
        return f"{self.clips} clip{'s' * (self.clips > 1)} at a time", f"--size {width}x{height}"

    @property
    def need(self) -> Need:
        weights = _bytes([parameters.abstract("dit", self.network), _streaming(self.decoder)[0]])
        window, (past, busy) = _window(self), _decoder(self)
        if self.platform != "cpu":
            busy = max(0, busy - window)
        return Need(weights, _cache(self), window, past + busy)

    def number(self, part: dit.DiTConfig | Decoder) -> int:
        """Bytes of a number that a part computes with."""
        return WIDE if self.platform == "cpu" else _width(part)

    def widened(self, part: dit.DiTConfig | Decoder) -> bool:
        return self.number(part) > _width(part)


def _plan(settings: ConfigDict, clips: int, method: str, platform: str | None) -> _Plan:
    video, network, vae, roll = sampler.sections(settings)
    used = sampler.tiny_decoder(settings)
    tiny = config.build(TinyVAEConfig, settings, "tiny") if "tiny" in settings else None
    stride, (_, down, across) = vae.spatial_stride, network.patch_size
    grid = -(-video.height // (stride * down)), -(-video.width // (stride * across))
    return _Plan(platform or axes.platform(), method, clips, grid, network, vae, tiny, used or vae, roll)


def _bytes(arrays: Any, width: int | None = None) -> int:
    """Of a tree of abstract arrays, in their own dtypes or with `width` bytes a number."""
    return sum(leaf.size * (width or leaf.dtype.itemsize) for leaf in jax.tree.leaves(arrays))


def _width(part: dit.DiTConfig | Decoder) -> int:
    return jnp.dtype(part.dtype).itemsize


@functools.cache
def _streaming(c: Decoder) -> tuple[dict[str, Any], int]:
    """A decoder's abstract parameters, and the bytes that it keeps of its past for each latent pixel."""
    vae, latents = isinstance(c, VAEConfig), jnp.zeros((1, 1, 1, 1, c.z_dim))
    module, params = VAE(c) if vae else TinyDecoder(c), parameters.abstract("vae" if vae else "tiny", c)
    decode = functools.partial(module.apply, method="decode_normalised")
    return params, _bytes(jax.eval_shape(lambda params: decode({"params": params}, latents)[1], params))


def _cache(p: _Plan) -> int:
    c, model = p.network, rollout.Model(dit.DiT(p.network), None, None, p.roll)
    frame_shape = (p.roll.block_frames, *p.latent, c.in_dim)
    state = jax.eval_shape(lambda: rollout.METHODS[p.method].init(model, p.clips, frame_shape))
    return _bytes(state) + 2 * c.num_layers * p.clips * c.text_len * c.dim * _width(c)


def _window(p: _Plan) -> int:
    """Peak of `stream.stream_step` besides its arguments: the denoising or the clean call, whichever needs more."""
    c, roll, params, number = p.network, p.roll, parameters.abstract("dit", p.network), p.number(p.network)
    block = roll.block_frames * prod(p.grid)  # tokens
    blocks = roll.num_steps if p.method == "rolling" else 1  # of the window
    window, past = blocks * block, (roll.span_blocks - 1) * block
    asked = (
        c.attention if p.platform in attention.BACKENDS[c.attention] else "auto"
    )  # what it lacks cannot run there
    in_the_open = attention.chosen(asked, p.platform, c.dtype, c.head_dim) == "xla"

    def kv(tokens: int) -> int:  # of all layers
        return 2 * c.num_layers * p.clips * tokens * c.dim * number

    def layer(queries: int, keys: int) -> int:
        rows = p.clips * c.num_heads * keys
        scores = 2 * min(rows * queries, max(rows, attention.MOST_SCORES)) * WIDE  # before and after the mask
        looked = in_the_open * (scores + queries * keys) + 2 * p.clips * (queries + keys) * c.dim * number
        hidden, mlp = (2 * p.clips * queries * size * number for size in (c.dim, c.ffn_dim))
        weights = 2 * _bytes(params["blocks"], number) // c.num_layers  # its own, and the next layer's
        together = (
            max if p.platform == "cpu" else sum
        )  # a TPU's compiler lets one begin before the other is gone
        return together((looked, mlp)) + hidden + weights

    frame = 4 * prod(p.latent) * c.in_dim + 12 * c.dim  # noise and modulation
    scene = (2 * (past + window) * c.head_dim + p.clips * blocks * roll.block_frames * frame) * WIDE
    # The clean call's keys and values of all layers, which an accelerator lays out once more for the cache.
    clean = (1 if p.platform == "cpu" else 2) * kv(block)
    calls = max(layer(block, past + block), layer(window, past + window))
    # XLA widens parameters and all that the clean call sees ahead of the layers.
    widened = _bytes(params, WIDE) + kv(c.text_len + past + block) if p.widened(p.network) else 0
    return int(SPARE * (widened + scene + clean + calls))


def _decoder(p: _Plan) -> tuple[int, int]:
    """Bytes of its past, and the most that decoding one block needs besides."""
    c, area, (params, past) = p.decoder, p.clips * prod(p.latent), _streaming(p.decoder)
    if isinstance(c, TinyVAEConfig):
        doubling, features, scores = c.temporal_upsample, (0, *c.widths[:-1]), 0
        maps = 2 * WIDE  # grown, and with its frames in order; a TPU pads so few features to 128
    else:
        doubling, features = c.temporal_downsample[::-1], [c.dim * n for n in c.dim_mult[::-1]]
        maps = 3 * p.number(c) + 4 * _width(c)  # parts of a convolution's sum; its ends and the shortcut
        scores, params = 3 * prod(p.latent) * WIDE, params["decoder"]
    largest = max(n * prod(4 * (1 + d) for d in doubling[:i]) for i, n in enumerate(features))
    # Of one latent frame at a time, at most: large video frames are made one by one.
    busy = area * max(maps * largest, scores)
    widened = _bytes(params, WIDE) if p.widened(c) else 0
    pasts = 2 if p.platform == "cpu" else 1  # before and after; elsewhere one takes the other's place
    return pasts * area * past, int(SPARE * (busy + widened))


def need(settings: ConfigDict, clips: int, method: str = "rolling", platform: str | None = None) -> Need:
    """What sampling so many clips at a time needs, in bytes; their length does not matter.

    A size that the patches do not tile counts as the next larger one; `sampler.load` refuses it. platform: "cpu", "gpu" or "tpu",
    by default this machine's.

    Raises:
      UserError: a section that is missing or wrong.
    """
    return _plan(settings, clips, method, platform).need


def capacity(device: jax.Device | None = None) -> int | None:
    """Bytes that a device has, by default the first; on CPU what the machine or its cgroup allows. None if unknown."""
    device = jax.local_devices()[0] if device is None else device
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    allowed = [Path(name).read_text().strip() for name in CGROUPS if os.path.isfile(name)]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in allowed if limit.isdigit())])


Way = tuple[
    range, Callable[[int], tuple[str, _Plan]]
]  # steps, the mildest first; what to call one, and its plan


def _ways(p: _Plan) -> list[Way]:
    """For each thing that can change, how; plans are made when they are asked for, as there may be millions."""
    name, (rows, columns) = "tiny" if isinstance(p.decoder, TinyVAEConfig) else "vae", p.grid
    network, decoder = (replace(part, dtype="bfloat16") for part in (p.network, p.decoder))
    narrow, said = p._replace(network=network, decoder=decoder), f"config.dit.dtype and config.{name}.dtype"

    def fewer(clips):
        plan = p._replace(clips=clips)
        return plan.words[0], plan

    def smaller(rows_left):
        plan = p._replace(grid=(rows_left, max(1, round(columns * rows_left / rows))))
        return plan.words[1], plan

    wide = (
        p.platform != "cpu" and max(_width(p.network), _width(p.decoder)) > 2
    )  # a CPU needs more for 16 bits
    heavy = p.tiny is not None and name == "vae"
    return [
        (range(wide), lambda _: (f"{said} = 'bfloat16'", narrow)),
        (range(heavy), lambda _: ("--decoder tiny", p._replace(decoder=p.tiny))),
        (range(p.clips - 1, 0, -1), fewer),
        (range(rows - 1, 0, -1), smaller),
    ]


def _advice(p: _Plan, available: int) -> str:
    """The changes that fit by themselves, and as many together as it takes."""

    def mildest(way: Way):  # the first that fits, else the last
        steps, change = way
        index = bisect.bisect_left(steps, True, key=lambda step: change(step)[1].need.total <= available)
        return map(change, steps[index : index + 1] or steps[-1:])

    alone = [change for way in _ways(p) for change in mildest(way)]
    options, together = [words for words, plan in alone if plan.need.total <= available], []
    for index in range(len(_ways(p))):
        for words, changed in mildest(_ways(p)[index]):
            p, together = changed, [*together, words]
        if p.need.total <= available:
            return f"this would fit: {', or '.join(dict.fromkeys([*options, ' with '.join(together)]))}"
    weights, least = gib(p.need.parameters), gib(p.need.total)
    return f"nothing fits: the network alone needs {weights}, with the smallest clip {least}"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / GIB:.2g} GiB"


def check(
    settings: ConfigDict,
    clips: int,
    available: int | None,
    method: str = "rolling",
    platform: str | None = None,
) -> Need:
    """What `need` says, if it fits in the available bytes or these are unknown.

    Raises:
      UserError: it does not fit; says what is needed and what would fit. Or a section that is missing or wrong.
    """
    plan = _plan(settings, clips, method, platform)
    if available is None or plan.need.total <= available:
        return plan.need
    parts = ", ".join(f"{name} {gib(size)}" for name, size in plan.need._asdict().items())
    said = f"{', '.join(plan.words)}: this needs {gib(plan.need.total)} ({parts})"
    raise UserError(f"{said}, but the device has {gib(available)}; {_advice(plan, available)}.")

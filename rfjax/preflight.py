"""Does it fit? The memory that sampling needs, counted before anything is loaded.

    python -m rfjax.preflight --config configs/wan_1_3b.py --clips 2 --memory 80

Parameters, cache and the decoder's past are counted exactly, from abstract shapes; what a step needs besides is a sum of the arrays
alive at its peak, calibrated against XLA's own count (`memory_analysis` of the compiled steps on CPU, jax 0.10) from the tests'
sizes to Wan 1.3B at 832x480: never below it, at most 1.6 times it (twice where attention scores of several clips are nearly all
there is). Elsewhere XLA differs: the step of Wan 1.3B in bfloat16 takes 23.4 GiB on CPU, where operands are widened to float32,
and 31.5 GiB compiled for a TPU v5p, where the sum says 31.4. No GPU was tried.
"""

import argparse
import bisect
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rfjax import config, dit, rollout
from rfjax.attention import MOST_SCORES
from rfjax.errors import UserError, exit_cleanly
from rfjax.tiny_vae import TinyDecoder, TinyVAEConfig
from rfjax.tree import flatten, unflatten
from rfjax.vae import VAE, VAEConfig

CONFIG = Path(__file__).parents[1] / "configs/shapes.py"
GIB = 2**30
WIDE = 4  # bytes of a number in products and softmax, whatever the parameters are kept in
SPARE = 1.1  # what is lost between arrays, and the many small ones
STATISTICS = ("latent_mean", "latent_std")  # of the VAE; always float32
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
Decoder = VAEConfig | TinyVAEConfig
Video = make_dataclass("Video", [("height", int), ("width", int), ("fps", float)])


class Need(NamedTuple):
    """Bytes on the device. The text encoder runs on the host and is not counted."""

    parameters: int  # of the transformer and of the decoder in use
    cache: int  # keys and values of past blocks and of the prompts, and the window
    window: int  # the most that one step of the stream needs besides
    decoder: int  # its past, and the most that decoding one block needs besides

    @property
    def total(self) -> int:
        """The sum: a block may be decoded while the next is under way."""
        return sum(self)


class _Plan(NamedTuple):
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
        return f"{self.clips} clip{'s' * (self.clips > 1)} at a time", f"a size of {width}x{height}"


def _plan(settings: ConfigDict, clips: int) -> _Plan:
    video, network = config.build(Video, settings, "video"), config.build(dit.DiTConfig, settings, "dit")
    vae, kind = config.build(VAEConfig, settings, "vae"), settings.get("decoder", "vae")
    if kind not in ("vae", "tiny"):
        raise UserError(f"config.decoder is {kind!r}; it must be 'vae' or 'tiny'.")
    tiny = config.build(TinyVAEConfig, settings, "tiny") if "tiny" in (*settings, kind) else None
    stride, (_, down, across) = vae.spatial_stride, network.patch_size
    grid = -(-video.height // (stride * down)), -(-video.width // (stride * across))
    roll = config.build(rollout.RolloutConfig, settings, "rollout")
    return _Plan(clips, grid, network, vae, tiny, tiny if kind == "tiny" else vae, roll)


def _bytes(arrays: Any, width: int | None = None) -> int:
    """Of a tree of abstract arrays, in their own dtypes or with `width` bytes a number."""
    return sum(leaf.size * (width or leaf.dtype.itemsize) for leaf in jax.tree.leaves(arrays))


def _width(part: dit.DiTConfig | Decoder) -> int:
    return jnp.dtype(part.dtype).itemsize


def _module(part: Decoder) -> VAE | TinyDecoder:
    return VAE(part) if isinstance(part, VAEConfig) else TinyDecoder(part)


@functools.cache
def _parameters(part: dit.DiTConfig | Decoder) -> dict[str, Any]:
    """Abstract parameters, in the dtype that sampling keeps them in."""
    if isinstance(part, dit.DiTConfig):
        tree = jax.eval_shape(functools.partial(dit.init, part), jax.random.key(0))
    else:
        side, channels = (part.spatial_stride, 3) if isinstance(part, VAEConfig) else (1, part.z_dim)
        shown = jnp.zeros((1, 1, side, side, channels))
        tree = jax.eval_shape(_module(part).init, jax.random.key(0), shown)["params"]
    flat = flatten(tree)
    kept = {path: leaf.dtype if path in STATISTICS else part.dtype for path, leaf in flat.items()}
    return unflatten({path: jax.ShapeDtypeStruct(leaf.shape, kept[path]) for path, leaf in flat.items()})


def _cache(p: _Plan) -> int:
    def begin(params):
        module, context = dit.DiT(p.network), jnp.zeros((p.clips, p.network.text_len, p.network.text_dim))
        text_kv = module.apply({"params": params}, context, method="text_kv")
        model = rollout.Model(module, params, text_kv, p.roll)
        frame_shape = (p.roll.block_frames, *p.latent, p.network.in_dim)
        return text_kv, rollout.rolling_init(model, p.clips, frame_shape)

    return _bytes(jax.eval_shape(begin, _parameters(p.network)))


def _window(p: _Plan) -> int:
    """Peak of `rollout.stream_step` besides its arguments: the window's call or the clean call, whichever needs more."""
    c, roll, params = p.network, p.roll, _parameters(p.network)
    block = roll.block_frames * p.grid[0] * p.grid[1]  # tokens
    window, past = roll.num_steps * block, (roll.span_blocks - 1) * block

    def kv(tokens: int, width: int = WIDE) -> int:  # of all layers
        return 2 * c.num_layers * p.clips * tokens * c.dim * width

    def layer(queries: int, keys: int) -> int:
        rows = p.clips * c.num_heads * keys
        scores = 2 * min(rows * queries, max(rows, MOST_SCORES)) * WIDE  # before and after the mask
        attention = scores + 2 * p.clips * (queries + keys) * c.dim * WIDE + queries * keys
        hidden, mlp = (2 * p.clips * queries * size * WIDE for size in (c.dim, c.ffn_dim))
        return max(attention, mlp) + hidden + _bytes(params["blocks"], WIDE) // c.num_layers

    widened = _bytes(params, WIDE) + kv(c.text_len) if _width(c) < WIDE else 0
    rotations = 2 * (past + window) * c.head_dim * WIDE
    noise_and_modulation = 4 * p.latent[0] * p.latent[1] * c.in_dim + 12 * c.dim
    scene = rotations + p.clips * roll.num_steps * roll.block_frames * noise_and_modulation * WIDE
    read = 3 * kv(past) // 2  # keys or values once more while they change their layout
    changed = kv((roll.sink_blocks + roll.ring_blocks + 1) * block, _width(c))
    clean = changed + read + layer(block, past + block)
    denoise = read + kv(past + block - window) + layer(window, past + window)
    return int(SPARE * (widened + scene + max(clean, denoise)))


@functools.cache
def _past(part: Decoder) -> int:
    """Bytes that a streaming decoder keeps for each latent pixel of each clip."""
    decode = functools.partial(_module(part).apply, method="decode_normalised")
    latents = jnp.zeros((1, 1, 1, 1, part.z_dim))
    return _bytes(jax.eval_shape(lambda params: decode({"params": params}, latents)[1], _parameters(part)))


def _decoder(p: _Plan) -> int:
    part, params, area = p.decoder, _parameters(p.decoder), p.roll.block_frames * p.latent[0] * p.latent[1]
    if isinstance(part, TinyVAEConfig):
        doubling, features = part.temporal_upsample, (0, *part.widths[:-1])
        maps, scores = 2 * WIDE, 0  # grown, and with its frames in order
    else:
        doubling, features = part.temporal_downsample[::-1], [part.dim * n for n in part.dim_mult[::-1]]
        maps = 3 * WIDE + 4 * _width(part)  # parts of a convolution's sum; its ends and the shortcut
        scores, params = 3 * p.latent[0] * p.latent[1] * WIDE, params["decoder"]
    largest = max(n * math.prod(4 * (1 + d) for d in doubling[:i]) for i, n in enumerate(features))
    widened = _bytes(params, WIDE) if _width(part) < WIDE else 0
    past = p.clips * p.latent[0] * p.latent[1] * _past(part)
    return int(
        2 * past + SPARE * (p.clips * area * max(maps * largest, scores) + widened)
    )  # old and new past


def _need(p: _Plan) -> Need:
    parameters = _bytes([_parameters(p.network), _parameters(p.decoder)])
    return Need(parameters, _cache(p), _window(p), _decoder(p))


def need(settings: ConfigDict, clips: int) -> Need:
    """What sampling so many clips at a time needs, in bytes; their length does not matter.

    A size that the patches do not tile counts as the next larger one; `sampler.load` refuses it.

    Raises:
      UserError: a section that is missing or wrong.
    """
    return _need(_plan(settings, clips))


def capacity(device: jax.Device | None = None) -> int | None:
    """Bytes that a device has, by default the first; on CPU what the machine and its cgroups allow. None if unknown."""
    device = jax.local_devices()[0] if device is None else device
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """Bytes that each cgroup around this process allows, where it says so; of version 2 and of version 1."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else ():
        _, kind, own = line.split(":", 2)
        for folder in (Path(own), *Path(own).parents) if kind in ("", "memory") else ():
            file = CGROUPS / kind / folder.relative_to("/") / f"memory.{'limit_in_bytes' if kind else 'max'}"
            if file.is_file() and (limit := file.read_text().strip()).isdigit():
                yield int(limit)


def _ways(p: _Plan) -> list[list[tuple[str, _Plan]]]:
    """For each thing that can change, the plans that change it, the mildest first, and what to call them."""
    name = "tiny" if isinstance(p.decoder, TinyVAEConfig) else "vae"
    network, decoder = (replace(part, dtype="bfloat16") for part in (p.network, p.decoder))
    narrow, said = p._replace(network=network, decoder=decoder), f"config.dit.dtype and config.{name}.dtype"
    rows, columns = p.grid
    fewer = [p._replace(clips=clips) for clips in range(p.clips - 1, 0, -1)]
    smaller = [p._replace(grid=(n, max(1, round(columns * n / rows)))) for n in range(rows - 1, 0, -1)]
    return [
        [(f"{said} = 'bfloat16'", narrow)] if max(_width(p.network), _width(p.decoder)) > 2 else [],
        [("config.decoder = 'tiny'", p._replace(decoder=p.tiny))] if p.tiny and name == "vae" else [],
        [(plan.words[0], plan) for plan in fewer],
        [(plan.words[1], plan) for plan in smaller],
    ]


def _advice(p: _Plan, available: int) -> str:
    """The changes that fit by themselves, and as many together as it takes."""

    def fits(plan: _Plan) -> bool:
        return _need(plan).total <= available

    def mildest(way):  # the first that fits, else the last
        index = bisect.bisect_left(way, True, key=lambda change: fits(change[1]))
        return way[index : index + 1] or way[-1:]

    options = [words for way in _ways(p) for words, plan in mildest(way) if fits(plan)]
    together = []
    for index in range(len(_ways(p))):
        for words, changed in mildest(_ways(p)[index]):
            p, together = changed, [*together, words]
        if fits(p):
            return f"this would fit: {', or '.join(dict.fromkeys([*options, ' with '.join(together)]))}"
    least = _need(p)
    return f"nothing fits: the network alone needs {_gib(least.parameters)}, with the smallest clip {_gib(least.total)}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / GIB:.2g} GiB"


def check(settings: ConfigDict, clips: int, available: int | None) -> Need:
    """What `need` says, if it fits in the available bytes or these are unknown.

    Raises:
      UserError: it does not fit; says what is needed and what would fit. Or a section that is missing or wrong.
    """
    needed = need(settings, clips)
    if available is None or needed.total <= available:
        return needed
    parts, plan = ", ".join(f"{k} {_gib(v)}" for k, v in needed._asdict().items()), _plan(settings, clips)
    said = f"{plan.words[0]} in {plan.words[1]} need {_gib(needed.total)} ({parts})"
    raise UserError(f"{said}, but the device has {_gib(available)}; {_advice(plan, available)}.")


@exit_cleanly
def main(argv: list[str] | None = None) -> None:
    describe = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = (parser := argparse.ArgumentParser(**describe, allow_abbrev=False)).add_argument
    add("--config", default=str(CONFIG), help="Python file with get_config()")
    add("--clips", type=int, default=1, metavar="N", help="at a time (default %(default)s)")
    add("--memory", type=float, metavar="GIB", help="of the device (default: what it says)")
    args = parser.parse_args(argv)
    if args.clips < 1 or not (args.memory is None or 0 < args.memory < 2**30):
        raise UserError("--clips must be at least 1, and --memory a positive number of GiB.")
    settings = config.load(args.config)
    available = capacity() if args.memory is None else int(args.memory * GIB)
    needed = need(settings, args.clips)
    for name, size in (needed._asdict() | {"total": needed.total, "device": available}).items():
        print(f"{name:10}{'unknown' if size is None else _gib(size):>12}")
    check(settings, args.clips, available)
    verdict = "Give --memory to see whether it fits" if available is None else "It fits"
    print(f"{verdict}; the length does not matter, memory is the same after a second and after an hour.")


if __name__ == "__main__":
    main()

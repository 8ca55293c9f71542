"""What a block must compute and move, part by part, and how soon a chip could have done it (roofline: Williams et al., 2009).

    python -m rfjax.bench roofline --config configs/wan_1_3b.py [--size 832x480] [--samples 1] [--method rolling]

Operations are those of `formula.py`. Bytes are the least that must pass between chip and memory, each part by itself: parameters
read once a call, every part's inputs read and its results written once, scores never (a flash kernel's), keys and values of the
past read in every call. A part takes the greater of operations over the chip's peak and bytes over its bandwidth, all parts one
after another; a real program comes near it from above, or under it where it fuses parts.
"""

import numpy as np

from rfjax import config, sampler
from rfjax.bench import flags, formula
from rfjax.dit import DiTConfig
from rfjax.errors import Parser, UserError
from rfjax.preflight.chips import CHIPS, H200, Chip
from rfjax.rollout import METHODS, RolloutConfig
from rfjax.stream import method_of

Parts = dict[str, tuple[float, float]]  # name → (operations, bytes)
BETWEEN = "norms, gates, sums"
HERE = {**CHIPS, "h200": H200}


def call(c: DiTConfig, clips: int, frames: int, tokens: int, keys: int) -> Parts:
    """A call of the network, all layers: on `frames` frames of each clip, whose tokens attend to `keys` tokens."""
    size, n, seen = np.dtype(c.dtype).itemsize, clips * frames * tokens, clips * keys
    width, words = c.dim, clips * c.text_len
    layer = {  # elements: parameters, then what goes in and out
        "q, k, v, out": 4 * width**2 + 6 * n * width,
        "self-attention": 2 * n * width + 2 * seen * width,
        "text: q, out": 2 * width**2 + 4 * n * width,
        "text: attention": 2 * n * width + 2 * words * width,
        "MLP": 2 * width * c.ffn_dim + 2 * n * (width + c.ffn_dim),
        BETWEEN: 15 * n * width,  # three norms (in, out) and three sums (two in, one out)
    }
    patch = c.in_dim * int(np.prod(c.patch_size))
    ends = {"patches in, out": 2 * n * (width + patch), "time": 7 * width**2}
    moved = {name: c.num_layers * count * size for name, count in layer.items()}
    moved |= {name: count * size for name, count in ends.items()}
    counted = formula.parts(c, frames, tokens, keys)
    return {name: (clips * counted.get(name, 0.0), float(moved[name])) for name in moved}


def block(c: DiTConfig, roll: RolloutConfig, method: str, tokens: int, clips: int) -> Parts:
    """All calls of a block in the steady state."""
    keys = roll.span_blocks * roll.block_frames * tokens
    blocks, windows = (roll.num_steps, 1) if method == "rolling" else (1, roll.num_steps)
    window = call(c, clips, blocks * roll.block_frames, tokens, keys)
    clean = call(c, clips, roll.block_frames, tokens, keys)
    return {
        name: tuple(windows * one + other for one, other in zip(window[name], clean[name], strict=True))
        for name in window
    }


def seconds(work: float, moved: float, chip: Chip) -> float:
    """The least time of a part."""
    return max(work / chip.flops, moved / chip.hbm)


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m rfjax.bench roofline",
        description=__doc__,
    )
    parser.add_argument("--config", default=str(flags.CONFIG), help="Python file with get_config()")
    parser.add_argument("--size", metavar="WxH", help="of the video (default: config.video)")
    parser.add_argument("--samples", type=int, default=1, metavar="B", help="clips at a time (default 1)")
    parser.add_argument("--method", choices=sorted(METHODS), help="default: config.method, else rolling")
    args, rest = parser.parse_known_args(argv)
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, not {args.samples}.")
    settings = config.changed(config.load(args.config), rest)
    if args.size is not None:
        sampler.resize(settings, args.size)
    video, network, codec, roll = sampler.sections(settings)
    height, width, _ = sampler.latent_size(video, codec, network)
    tokens = height * width // int(np.prod(network.patch_size))
    parts = block(network, roll, method_of(settings, args.method), tokens, args.samples)
    show(parts, args.samples * sampler.block_lengths(codec, roll)[1])


def show(parts: Parts, frames: int) -> None:
    """Prints the table; `frames` video frames of all clips come out of a block."""
    chips = "".join(f"{f'{name}, ms':>12}" for name in HERE)
    print(f"{'a block':20}{'TFLOP':>10}{'GB':>10}{'FLOP/byte':>11}{chips}")
    rows = parts | {"all": tuple(map(sum, zip(*parts.values(), strict=True)))}
    least = {name: sum(seconds(*part, chip) for part in parts.values()) for name, chip in HERE.items()}
    for part, (work, moved) in rows.items():
        times = least if part == "all" else {name: seconds(work, moved, chip) for name, chip in HERE.items()}
        cells = "".join(f"{1e3 * taken:>12.4g}" for taken in times.values())
        print(f"{part:20}{work / 1e12:>10.4g}{moved / 1e9:>10.4g}{work / moved:>11.4g}{cells}")
    print(f"{'frames/s at most':51}" + "".join(f"{frames / taken:>12.4g}" for taken in least.values()))

"""The command line, and the checks that come before any work."""

import argparse
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rfjax import attention, compilation, config, parameters, placement, preflight, quantize, sampler
from rfjax.bench import parts
from rfjax.errors import Parser, UserError
from rfjax.files import check_writable
from rfjax.preflight.estimate import gib
from rfjax.rollout import METHODS
from rfjax.stream import method_of
from rfjax.umt5 import UMT5Config

CONFIG = Path(__file__).parents[2] / "configs/shapes.py"
STEPS = ("first", "stream", *parts.PARTS)  # all that can be measured
PICTURES = (".png", ".svg", ".pdf")


def parse(argv: list[str] | None, description: str) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags, and the config with all that they change; UserError for what cannot be, before any device is asked."""
    parser = Parser(
        prog="python -m rfjax.bench",
        description=description,
    )
    add = parser.add_argument
    add("--config", default=str(CONFIG), help="Python file with get_config() (default configs/shapes.py)")
    add(
        "--weights",
        default=sampler.RANDOM,
        metavar="random|DIR|HUB_ID",
        help="random numbers, which take no download and the same time, or weights as sample.py takes them (default random)",
    )
    add("--size", metavar="WxH", help="of the video (default: config.video)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--frames", type=int, metavar="N", help="video frames that the stream is measured for"
    )
    length.add_argument("--blocks", type=int, default=32, metavar="N", help="the same in blocks (default 32)")
    add("--seconds", type=int, metavar="N", help="end the stream early once it was measured for so long")
    add("--samples", type=int, default=1, metavar="B", help="clips at a time (default 1)")
    add("--method", choices=sorted(METHODS), help="default: config.method, else rolling")
    add("--dtype", choices=("float32", "bfloat16"), help="of network and decoder (default: the config's)")
    add("--decoder", choices=("wan", "tiny", "none"), help="none: the network alone (default: the config's)")
    add(
        "--quantize",
        choices=sorted(quantize.MODES),
        help="8 bits for products and weights, the cache, or both",
    )
    add("--attention", choices=attention.BACKENDS, help="the kernel of attention (default: the config's)")
    add(
        "--devices",
        metavar="WHICH",
        help="like 4 or data=2,context=2,decoder=1 (docs/devices.md); default: one",
    )
    add("--parts", metavar="NAMES", help=f"what to measure, of {','.join(STEPS)} (default: all)")
    add("--compile_cache", metavar="DIR", help="where compiled programs are kept (default: as sample.py)")
    add("--json", metavar="FILE", help="write all figures there")
    add("--plot", metavar="FILE", help="draw the latency of every block: *.png, *.svg or *.pdf")
    add("--skip_preflight", action="store_true", help="go ahead even if memory will probably not do")
    args, rest = parser.parse_known_args(argv)
    settings = config.changed(config.load(args.config), rest)
    settings = quantize.configured(settings, args.quantize) if args.quantize else settings
    args.method = method_of(settings, args.method)
    check(args, settings)
    override(args, settings)
    return args, settings


def check(args: argparse.Namespace, settings: ConfigDict) -> None:
    """UserError for numbers, names and files that cannot be."""
    for name in ("frames", "blocks", "seconds", "samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    args.parts = STEPS if args.parts is None else tuple(args.parts.split(","))
    if unknown := set(args.parts) - set(STEPS):
        raise UserError(f"--parts has no {', '.join(sorted(unknown))}; choose from {','.join(STEPS)}.")
    if args.decoder == "tiny" and "tiny" not in settings:
        raise UserError(f"{args.config} has no tiny decoder; leave out --decoder.")
    if args.plot:
        if not args.plot.endswith(PICTURES):
            raise UserError(f"--plot needs a name that ends in {', '.join(PICTURES)}, not {args.plot}.")
        if "stream" not in args.parts:
            raise UserError("--plot draws the stream; put stream among --parts.")
        from rfjax.bench import plot  # noqa: F401  says now if there is no matplotlib
    for name in filter(None, (args.json, args.plot)):
        check_writable(name)


def override(args: argparse.Namespace, settings: ConfigDict) -> None:
    """Puts the flags that change the model into the config, and their effect on each other into the flags."""
    if args.size is not None:
        sampler.resize(settings, args.size)
    if args.decoder in ("wan", "tiny"):
        settings.decoder = {"wan": "vae"}.get(args.decoder, args.decoder)
    if args.dtype is not None:
        for name in {"dit", "vae", "tiny"} & set(settings):
            settings[name].dtype = args.dtype
    if args.attention is not None:
        settings.dit.attention = args.attention
    video, network, codec, roll = sampler.sections(settings)
    sampler.latent_size(video, codec, network)
    args.devices = placement.parse(args.devices) if args.devices else None
    if args.decoder == "none":
        args.parts = tuple(name for name in args.parts if name != "decode")
    if args.frames is not None:
        args.blocks = -(-args.frames // sampler.block_lengths(codec, roll)[1])


def load(args: argparse.Namespace, settings: ConfigDict) -> sampler.Sampler:
    """The sampler to measure, its weights on the device; UserError where it does not fit there, or UMT5 on the host."""
    devices = args.devices or placement.Devices()
    sampler.check_devices(settings, devices, args.samples)
    if not args.skip_preflight:
        share = args.samples // devices.data  # of the clips, on each device
        preflight.check(settings, share, preflight.capacity(), args.method)
        if "text" in args.parts and "umt5" in settings:
            check_reader(config.build(UMT5Config, settings, "umt5"))
    model = sampler.load(settings, args.weights)
    return model.over(args.devices) if args.devices else model


def check_reader(sizes: UMT5Config) -> None:
    """UserError where UMT5's parameters and what making them takes do not fit into the host's memory."""
    leaves = jax.tree.leaves(parameters.as_filed("umt5", sizes))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 8 * max(leaf.size for leaf in leaves)
    there = preflight.capacity(compilation.host())
    if needed > there:
        raise UserError(
            f"The text encoder needs {gib(needed)} of the host, which has {gib(there)}; leave text out of --parts."
        )

"""Does it fit? What a config needs of a device's memory, told before anything is loaded.

    python -m rfjax.preflight --config configs/wan_1_3b.py --clips 2 --memory 80
    python -m rfjax.preflight --config configs/wan_distill_14b.py --topology v6e:4x4 --config.mesh.fsdp=16

The first sums up sampling on one device. The second compiles the config's real steps for chips that need not be here, and tells
what each takes of a chip: of training the updates and, where a save shows clips, "sample" and "decoder"; of sampling the step of a
stream, "window", what it is in the steady state, "steady", and its "decoder". `--programs decoder` compiles that one alone. A
field of the config is changed by `--config.batch_size=16`. Exit code 0: it fits; 1, or 2
without --topology: it does not.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rfjax import config, placement, quantize, rollout, sampler, sharding
from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.files import check_writable, replacing
from rfjax.preflight import compiled, estimate, programs, report, topology
from rfjax.preflight.chips import CHIPS
from rfjax.preflight.estimate import GIB, gib
from rfjax.stream import method_of

CONFIG = Path(__file__).parents[2] / "configs/shapes.py"


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags, and the config with its fields changed."""
    parser = Parser(prog="python -m rfjax.preflight", description=__doc__)
    add = parser.add_argument
    add("--config", default=str(CONFIG), help="Python file with get_config()")
    add("--clips", type=int, default=1, metavar="N", help="at a time (default %(default)s)")
    add("--method", choices=sorted(rollout.METHODS), help="default: config.method, else rolling")
    add(
        "--quantize",
        metavar="MODE",
        help=f"in 8 bits: {', '.join(quantize.MODES)} (default: as the config says)",
    )
    add("--memory", type=float, metavar="GIB", help="of the device (default: what it says)")
    add("--platform", choices=("cpu", "gpu", "tpu"), help="that --memory is of (default: this machine's)")
    add("--topology", metavar="NAME", help=f"chips to compile for: {topology.EXAMPLES}")
    add(
        "--devices",
        metavar="WHICH",
        help="of --topology: those of a stream, as sample.py takes them (default 1)",
    )
    add("--programs", nargs="+", metavar="NAME", help="of --topology: those to compile (default: all)")
    add("--json", metavar="FILE", help="write the figures of --topology there")
    args, rest = parser.parse_known_args(argv)
    if args.clips < 1 or not (args.memory is None or 0 < args.memory < 2**30):
        raise UserError("--clips must be at least 1, and --memory a positive number of GiB.")
    if not args.topology and (args.json or args.programs or args.devices):
        raise UserError(
            "--json, --programs and --devices are about the programs of --topology; give that too."
        )
    if args.json:
        check_writable(args.json)
    settings = config.changed(config.load(args.config), rest)
    args.method = method_of(settings, args.method)
    return args, quantize.configured(settings, args.quantize) if args.quantize else settings


def sum_up(args: argparse.Namespace, settings: ConfigDict) -> None:
    """The estimate of sampling; UserError where it does not fit."""
    available = estimate.capacity() if args.memory is None else int(args.memory * GIB)
    parts = estimate.need(settings, args.clips, args.method, args.platform)
    for name, size in (parts._asdict() | {"total": parts.total, "device": available}).items():
        print(f"{name:10}{'unknown' if size is None else gib(size):>12}")
    if "stage" in settings:  # before what it may refuse
        print(f"This is sampling. What training its stage {settings.stage!r} takes is told with --topology.")
    estimate.check(settings, args.clips, available, args.method, args.platform)
    verdict = "Give --memory to see whether it fits" if available is None else "It fits"
    print(f"{verdict}; the length does not matter, memory is the same after a second and after an hour.")


def compile_for(args: argparse.Namespace, settings: ConfigDict) -> bool:
    """Compiles, prints and writes the figures; whether it fits."""
    devices, chip = topology.devices(args.topology), CHIPS.get(args.topology.partition(":")[0])
    memory = int(args.memory * GIB) if args.memory else None
    memory = memory or (chip.memory if chip else estimate.capacity() // len(devices))
    if "stage" in settings:
        mesh = sharding.make_mesh(config.build(sharding.MeshConfig, settings, "mesh"), devices)
        named = programs.training(settings, mesh)
        if args.devices:
            raise UserError("--devices is about a stream; of training, set config.mesh.")
        if args.quantize:
            raise UserError("--quantize is about a stream; training computes in config.dit.dtype.")
    else:
        split = placement.parse(args.devices or "1")
        sampler.check_devices(settings, split, args.clips, devices)
        _, network, _, roll = sampler.sections(settings)
        quantize.check(quantize.Mode(network.linear_dtype, roll.int8_cache), devices[0])
        where = placement.place(split, devices)
        mesh, named = where.network, programs.sampling(settings, where, args.clips, args.method)
    chosen = args.programs or list(named)
    if unknown := [name for name in chosen if name not in named]:
        raise UserError(f"There is no program {unknown[0]!r} here; --programs takes {', '.join(named)}.")
    print(f"{args.topology}: mesh {' × '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
    figures = compiled.measure(named, chosen)
    whole = "refused" not in figures.get("steady", {"refused": "not asked for"})
    if whole and args.method == "rolling":  # the other one loops over denoising steps too
        short = (programs.layered(settings, where, args.clips, layers) for layers in (1, 2))
        figures["steady"]["moved"] = compiled.moved(*short, network.num_layers)
    fits = report.show(figures, memory, chip, settings)
    if args.json:
        told = {"topology": args.topology, "mesh": dict(mesh.shape), "memory": memory, "fits": fits}
        with replacing(args.json) as path:
            path.write_text(json.dumps(told | {"programs": figures}, indent=1))
    return fits


@exit_cleanly
def main(argv: list[str] | None = None) -> None:
    args, settings = parse(argv)
    config.check(settings)
    with config.read_by("preflight", settings):
        if args.topology is None:
            sum_up(args, settings)
        else:
            jax.config.update("jax_platforms", "cpu")  # what is here is not asked
            if not compile_for(args, settings):
                sys.exit(1)


if __name__ == "__main__":
    main()

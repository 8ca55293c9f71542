"""How fast is it? Measures text, network, decoder and the whole stream on the machine at hand.

    python -m rfjax.bench --config configs/wan_1_3b.py --dtype bfloat16 --frames 480 --json run.json --plot run.png
    python -m rfjax.bench compare before.json after.json
    python -m rfjax.bench roofline --config configs/wan_1_3b.py
    python -m rfjax.bench quantize --golden tests/golden

Without --weights the numbers in the network are random, which takes no download and the same time. A field of the config is
changed by `--config.rollout.shift=3.0`. docs/latency.md says what each figure is.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rfjax import attention, axes, compilation, config, placement, quantize, sampler
from rfjax.bench import compare, eight_bits, first, flags, parts, report, roofline, stamp, stream
from rfjax.errors import exit_cleanly
from rfjax.files import replacing
from rfjax.umt5 import UMT5Config


def measure(
    args: argparse.Namespace, settings: ConfigDict, argv: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was measured, all figures so far) again and again, the stream first; docs/latency.md describes them.

    UserError for what cannot run here.
    """
    with config.read_by("bench", settings):
        decoded, captions = args.decoder != "none", [settings.prompt] * args.samples
    told: dict[str, Any] = {"schema": compare.SCHEMA, "version": compare.VERSION}
    if "first" in args.parts:  # before this process takes the device
        told["first_frame"] = {}
        for name, figures in first.apart(argv):
            told["first_frame"][name] = figures
            print(f"first frame, {report.FIRST[name]}: {figures['total_s']:.1f} s", flush=True)
            yield "first", told
    compilation.keep_programs(args.compile_cache)
    model = flags.load(args, settings)
    told |= stamp.stamp(argv) | {"run": conditions(args, settings), "config": settings.to_dict()}
    reader = config.build(UMT5Config, settings, "umt5") if "umt5" in settings else None
    wanted = [name for name in args.parts if name in parts.PARTS]
    told["parts"] = {}
    if "stream" in args.parts:
        told["stream"] = stream.measure(model, captions, args.method, decoded, args.blocks, args.seconds)
        told["peak"] = stream.memory_peak()  # the stream's: what comes below draws large arrays of its own
        print(f"stream: {report.milliseconds(told['stream']['block_latency']['p50_s'])}", flush=True)
        yield "stream", told
    for name, figures in parts.measure(model, wanted, captions, args.method, reader):
        told["parts"][name] = figures
        rates(told, args.samples * sampler.block_lengths(model.vae.config, model.rollout)[1])
        print(f"{name}: {report.milliseconds(figures['median_s'])}", flush=True)
        yield name, told
    told["sent"] = parts.sent(model, captions, args.method)
    if "first_frame" in told:
        told["first_frame"]["warm"] = first.warm(model, captions, args.method, decoded)
    yield "sent", told


def conditions(args: argparse.Namespace, settings: ConfigDict) -> dict[str, Any]:
    """What was asked for and what it comes to here, the flags' effect included."""
    _, network, _, roll = sampler.sections(settings)
    decoder = args.decoder or {"vae": "wan"}.get(settings.get("decoder", "vae"), "tiny")
    return {
        "parts": list(args.parts),
        "weights": args.weights,
        "size": f"{settings.video.width}x{settings.video.height}",
        "samples": args.samples,
        "blocks": args.blocks,
        "seconds": args.seconds,
        "method": args.method,
        "decoder": decoder,
        "dtype": network.dtype,
        "quantize": quantize.named(quantize.Mode(network.linear_dtype, roll.int8_cache)),
        "devices": dataclasses.asdict(args.devices or placement.Devices()),
        "attention": attention.chosen(network.attention, axes.platform(), network.dtype, network.head_dim),
        "compile_cache": args.compile_cache,
    }


def rates(told: dict[str, Any], frames: int) -> None:
    """Adds what follows from the times: frames_per_s where a part makes a block, of `frames` frames of all clips; flops_per_s where
    operations are counted; and mfu, their share of the published peak of all devices that work on it."""
    peak, found, devices = told["hardware"]["peak_flops"], told["parts"], told["run"]["devices"]
    network, decoder = devices["data"] * devices["context"], devices["decoder"]
    for name in {"step", "decode"} & set(found):
        found[name]["frames_per_s"] = frames / found[name]["median_s"]
    timed = [
        (
            figures,
            figures.get("flops"),
            figures["median_s"],
            decoder or network if name == "decode" else network,
        )
        for name, figures in found.items()
    ]
    needed = {"step"} | ({"decode"} if told["run"]["decoder"] != "none" else set())
    if "stream" in told and needed <= set(found):
        work = sum(found[name]["flops"] for name in needed)
        timed.append((told["stream"], work, told["stream"]["block_latency"]["p50_s"], network + decoder))
    for figures, work, seconds, chips in timed:
        if work is not None:
            figures["flops_per_s"] = work / seconds
            figures |= {"mfu": work / seconds / (chips * peak)} if peak else {}


def save(args: argparse.Namespace, measured: str, told: dict[str, Any]) -> None:
    """Writes the figures, and the stream's picture once there is one: whatever ends the run later, these are there."""
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps(told, indent=1, default=str))
    if args.plot and measured == "stream":
        from rfjax.bench import plot

        with replacing(args.plot) as path:
            plot.draw(told, path, Path(args.plot).suffix[1:])


@exit_cleanly
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.show(argv[1:])
    if argv[:1] == ["roofline"]:
        return roofline.main(argv[1:])
    if argv[:1] == ["quantize"]:
        return eight_bits.main(argv[1:])
    args, settings = flags.parse(argv, __doc__)
    for measured, told in measure(args, settings, argv):
        save(args, measured, told)
    report.show(told)


if __name__ == "__main__":
    main()

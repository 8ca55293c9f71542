"""Judges videos: do they show what their caption says, and do they stay as they began?

    python -m rfjax.evaluate --prompts 64 --seconds 120 --methods rolling,self_forcing --out runs/drift
    python -m rfjax.evaluate --prompts 64 --seconds 20 --given video
    python -m rfjax.evaluate --ground_truth 64 [--damage]
    python -m rfjax.evaluate --videos clips --out runs/clips

The first rolls out held-out captions of the small world with a model (the shipped one, or --config and --weights); run again, it
goes on after its last finished batch. The second gives the model the first 2 s (or the first frame) of the rendered scene to go on
from: drift is then drift from the given object. The third judges rendered clips, crisp and then soft: what the judge gets wrong by
itself; with --damage also clips that are damaged on purpose. The last measures any mp4 files. docs/drift.md says what is measured.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from rfjax import compilation, config, detect, drift, quantize, sampler, shapes
from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.evaluate import draw, generate, keep, report, truth, videos
from rfjax.files import replacing
from rfjax.rollout import METHODS
from rfjax.score import WINDOW
from rfjax.stream import method_of

ROOT = Path(__file__).parents[2]
CAPTIONS = 64  # of the small world's held-out ones


def parse(argv):
    parser = Parser(prog="python -m rfjax.evaluate", description=__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--ground_truth", type=int, metavar="N", help="judge N rendered clips instead of a model's"
    )
    what.add_argument("--videos", metavar="DIR", help="measure the mp4 files of a folder instead")
    add("--damage", action="store_true", help="with --ground_truth: also clips damaged on purpose")
    add(
        "--prompts",
        type=captions,
        default=CAPTIONS,
        metavar="N",
        help="held-out captions, the first N; held_out: the first %(default)s, as by default",
    )
    add("--seconds", type=float, default=10.0, help="length of the clips (default %(default)g)")
    add("--given", choices=("picture", "video"), help="what the clips go on from (default nothing)")
    add(
        "--methods",
        type=lambda names: names.split(","),
        help=f"of {','.join(METHODS)} (default: config.method, else rolling)",
    )
    add("--config", default=str(ROOT / "configs/shapes.py"), help="Python file with get_config()")
    add("--weights", metavar="DIR", help="folder with dit.safetensors and vae.safetensors")
    add("--quantize", choices=quantize.MODES, help="judge the model in 8 bits")
    add(
        "--batch",
        type=int,
        default=8,
        help="clips rolled out together, on which their noise depends (default %(default)s)",
    )
    add("--objects", type=int, choices=(1, 2), default=1, help="in a rendered clip (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed gives other clips")
    add(
        "--out",
        metavar="DIR",
        help="folder for report.md, report.json, pictures, and what is needed to go on",
    )
    return parser.parse_args(argv)


def captions(word):
    """How many held-out captions a word asks for."""
    return CAPTIONS if word == "held_out" else int(word)


def check(args):
    """UserError for numbers, names and places that cannot be."""
    count = args.prompts if args.ground_truth is None else args.ground_truth
    if count < 1 or args.batch < 1:
        raise UserError("Need at least one clip: raise --prompts, --ground_truth or --batch.")
    if not 0 <= args.seed <= 2**32 - count:
        raise UserError(f"--seed must lie between 0 and 2^32 minus the number of clips, not {args.seed}.")
    if not WINDOW <= args.seconds < float("inf"):
        raise UserError(
            f"A clip is judged by {WINDOW} seconds of it: raise --seconds, which is {args.seconds:g}."
        )
    unknown = set(args.methods or ()) - set(METHODS)
    if unknown:
        raise UserError(f"There is no method {min(unknown)!r}; --methods takes {', '.join(METHODS)}.")
    if args.damage and args.ground_truth is None:
        raise UserError("--damage damages rendered clips; give --ground_truth N with it.")
    if args.damage and args.objects == 2:
        raise UserError("--damage shows clips of one object; leave out --objects 2.")
    if args.out:
        keep.check(args.out)


def of_model(args):
    """A model's clips by every method: the report's text, its figures, and pictures."""
    settings = config.load(args.config)
    if "world" not in settings:
        raise UserError(
            f"{args.config} has no small world (config.world), in which clips are judged by their captions; make clips with "
            "sample.py, and give their folder by --videos."
        )
    world = config.build(shapes.World, settings, "world")
    detect.check(world, sampler.sections(settings)[0].fps)
    scenes = [shapes.sample_scene(index, args.seed, world, "held_out") for index in range(args.prompts)]
    names = args.methods or [method_of(settings)]
    settings = quantize.configured(settings, args.quantize) if args.quantize else settings
    compilation.keep_programs()
    model = sampler.load(settings, args.weights, given=args.given is not None)
    task = generate.Task(args.prompts, args.seconds, args.seed, args.batch, args.given)
    with keep.folder(args.out, generate.described(task, model, settings)) as place:
        methods = {name: generate.judged(model, scenes, name, task, place) for name in names}
        if args.out:
            sheets(methods, scenes, task, place)
    if len(methods) == 1:
        return told(methods)
    text, figures, lines = told(methods, f"{report.compared(methods)}\n\n")
    ratios = {name: ratio._asdict() for name, ratio in report.ratios(methods).items()}
    return text, figures | {f"ratios to {names[-1]}": ratios}, lines


def told(methods, before=""):
    """{name: scores} → text that begins with `before`, figures, {name: curves}."""
    text = before + "\n".join(f"## {name}\n\n{report.tables(scores)}" for name, scores in methods.items())
    figures = {name: {"summary": report.summary(scores), "clips": scores} for name, scores in methods.items()}
    return text, figures, {name: report.curves(scores) for name, scores in methods.items()}


def sheets(methods, scenes, task, place):
    """A contact sheet for each of the first captions: one row a method."""
    times = np.linspace(0, task.seconds, draw.COLUMNS)
    for index, scene in enumerate(scenes[: generate.SHOWN]):
        strips = {name: Image.open(generate.strip(place / "batches", name, index)) for name in methods}
        draw.sheet(strips, times, shapes.caption(scene), place / f"sheet_{index}.png")


def of_truth(args):
    """Rendered clips, crisp and soft; with --damage the matrix and the anchors of the drift score."""
    if args.out:
        asked = ("ground_truth", "seconds", "objects", "seed", "damage")
        keep.claim(Path(args.out), {name: getattr(args, name) for name in asked} | {"judge": drift.VERSION})
    clips = args.ground_truth, args.seconds, shapes.World(objects=args.objects), args.seed
    text, figures, lines = told(
        {"rendered": truth.judge(*clips), "blurred and noisy": truth.judge(*clips, camera=truth.soft)}
    )
    if args.damage:
        rows = truth.matrix(args.ground_truth, args.seed)
        anchors, least = truth.calibration(args.ground_truth, args.seed)
        text += f"\n## Damaged from the middle on\n\n{truth.matrix_table(rows)}\n"
        text += f"\n## Anchors\n\n{truth.calibration_table(anchors, least)}\n"
        figures |= {"damage": rows, "anchors": anchors, "least": least}
    return text, figures, lines


def of_videos(args):
    """Any videos: a table of all, and one line a file."""
    files = videos.files(args.videos)
    if args.out:
        keep.claim(Path(args.out), {"videos": os.path.abspath(args.videos)})
    measured = {path.name: videos.measure(path) for path in tqdm(files, unit=" video")}
    found, looks = ({name: pair[part] for name, pair in measured.items()} for part in (0, 1))
    length = min(map(len, looks.values()))
    if args.out:
        strips = {name: draw.strip(some[:length]) for name, some in looks.items()}
        draw.sheet(
            strips, draw.spread(length), "each video, at the seconds above", Path(args.out) / "sheet.png"
        )
    series = {
        f"{name} ({unit})": [one[name] for one in found.values()] for name, unit in videos.UNITS.items()
    }
    text = f"{len(found)} videos of {length} s or more\n\n{report.ends_table(series)}\n"
    for path, one in found.items():
        rows = {f"{name} ({unit})": [one[name]] for name, unit in videos.UNITS.items()}
        text += f"\n## {path}\n\n{report.ends_table(rows)}\n"
    groups = {
        path: {f"{name}, {unit}": one[name][None] for name, unit in videos.UNITS.items()}
        for path, one in found.items()
    }
    return text, found, groups


@exit_cleanly
def main(argv=None):
    args = parse(argv)
    check(args)
    judge = of_videos if args.videos is not None else of_model if args.ground_truth is None else of_truth
    text, figures, curves = judge(args)
    print(text)
    if args.out:
        place = Path(args.out)
        place.mkdir(parents=True, exist_ok=True)
        with replacing(place / "report.md") as path:
            path.write_text(text)
        keep.write(place / "report.json", figures)
        draw.curves(curves, place / "by_second.png")


if __name__ == "__main__":
    main()

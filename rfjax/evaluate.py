"""Judges videos of the small world: do they show what the caption says, and do they stay as they began?

    python -m rfjax.evaluate --prompts 64 --seconds 60 --methods rolling,self_forcing --out report.md
    python -m rfjax.evaluate --prompts 64 --seconds 20 --given video
    python -m rfjax.evaluate --ground_truth 256

The first rolls out held-out captions with a model (the shipped one, or --config and --weights). The second gives it the
first frame or the first 2 s of the rendered scene to go on from: drift is then drift from the given object. The third judges
rendered clips, crisp and then blurred and noisy: what the detector gets wrong by itself.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rfjax import compilation, config, quantize, sampler, shapes
from rfjax.errors import UserError, exit_cleanly
from rfjax.files import check_writable, replacing
from rfjax.rollout import METHODS
from rfjax.score import report, score

ROOT = Path(__file__).parents[1]
BLUR, NOISE = 0.7, 4.0  # standard deviations: pixels, levels of 255


def evaluate_videos(videos, captions, fps=16):
    """Scores of many clips.

    Args:
        videos: iterable of uint8 [F, 64, 64, 3]; may be a generator, only one clip is held at a time.
        captions: as many strings.

    Returns:
        list of dicts, see `rfjax.score.score`; `rfjax.score.report` makes tables of them.
    """
    pairs = zip(videos, captions, strict=True)
    return [score(video, caption, fps) for video, caption in tqdm(pairs, total=len(captions), desc="judge")]


def ground_truth(count, seconds, world, seed=0, damage=False):
    """Scores of rendered clips, half of them of each split; `damage` blurs them and adds noise."""
    splits = [(index // 2, shapes.SPLITS[index % 2]) for index in range(count)]
    scenes = [shapes.sample_scene(index, seed, world, split) for index, split in splits]
    frames = round(seconds * world.fps)
    videos = (shapes.render(scene, 0, frames) for scene in scenes)
    if damage:
        videos = (blurred(video, np.random.default_rng((seed, i))) for i, video in enumerate(videos))
    return evaluate_videos(videos, [shapes.caption(scene) for scene in scenes], world.fps)


def blurred(video, rng, sigma=BLUR, noise=NOISE):
    """uint8 [F, H, W, 3] after a Gaussian blur and Gaussian noise: roughly what a small VAE does to it."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    out = video.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(out, [(2, 2) if side == axis else (0, 0) for side in range(4)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 5, axis)
        out = windows @ (taps / taps.sum()).astype(np.float32)
    out += noise * rng.standard_normal(out.shape, np.float32)
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)


def generated(model, scenes, seconds, method, seed, batch, given=None):
    """Scores of one clip a scene's caption, rolled out `batch` at a time; only those are held.

    The clips begin with the scenes' first frame ("picture"), their first 33 ("video"), or nothing.
    """
    fps, scores = model.video.fps, []
    frames = round(seconds * fps)
    for start in tqdm(range(0, len(scenes), batch), desc=method, unit=" batch"):
        some = scenes[start : start + batch]
        captions, past = (
            [shapes.caption(scene) for scene in some],
            model.encode(beginnings(model, some, given)),
        )
        blocks = model.latents(captions, seed + start, model.latent_frames(frames), method, past)
        videos = np.concatenate(list(model.decode(blocks)), 1)[:, :frames]
        scores += [score(video, caption, fps) for video, caption in zip(videos, captions, strict=True)]
    return scores


def beginnings(model, scenes, given):
    """The frames that clips of some scenes begin with, uint8 [B, H, W, 3]."""
    if given is None:
        return []
    first, later = sampler.block_lengths(model.vae.config, model.rollout)
    length = 1 if given == "picture" else first + 2 * later
    videos = np.stack([shapes.render(scene, 0, length) for scene in scenes], 1)
    return np.repeat(videos, first, 0) if given == "picture" else videos


def generated_tables(args):
    """A report for each method, on the same held-out captions."""
    settings = config.load(args.config)
    world = config.build(shapes.World, settings, "world")
    scenes = [shapes.sample_scene(index, args.seed, world, "held_out") for index in range(args.prompts)]
    model = sampler.load(settings, args.weights, given=args.given is not None, quantize=args.quantize)
    for method in args.methods.split(","):
        scores = generated(model, scenes, args.seconds, method, args.seed, args.batch, args.given)
        yield f"## {method}\n\n{report(scores)}"


def ground_truth_tables(args):
    """A report for crisp clips and one for damaged ones."""
    clips = args.ground_truth, args.seconds, shapes.World(objects=args.objects), args.seed
    yield f"## Rendered\n\n{report(ground_truth(*clips))}"
    yield f"## Blurred and noisy\n\n{report(ground_truth(*clips, damage=True))}"


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--ground_truth", type=int, metavar="N", help="judge N rendered clips instead of a model's")
    add("--prompts", type=int, default=64, metavar="N", help="held-out captions (default %(default)s)")
    add("--seconds", type=float, default=10.0, help="length of the clips (default %(default)g)")
    add("--given", choices=("picture", "video"), help="what the clips go on from (default nothing)")
    add("--methods", default="rolling", help=f"of {','.join(METHODS)} (default %(default)s)")
    add("--config", default=str(ROOT / "configs/shapes.py"), help="Python file with get_config()")
    add("--weights", metavar="DIR", help="folder with dit.safetensors and vae.safetensors")
    add("--quantize", choices=quantize.MODES, help="judge the model in 8 bits")
    add("--batch", type=int, default=8, help="clips rolled out together (default %(default)s)")
    add("--objects", type=int, choices=(1, 2), default=1, help="in a rendered clip (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed gives other clips")
    add("--out", metavar="FILE", help="also write the tables to a Markdown file")
    return parser.parse_args(argv)


@exit_cleanly
def main(argv=None):
    args = parse(argv)
    count = args.prompts if args.ground_truth is None else args.ground_truth
    if count < 1 or args.batch < 1 or not 5 <= args.seconds < float("inf"):
        raise UserError(
            "Need at least one clip of 5 seconds: raise --prompts, --ground_truth, --batch or --seconds."
        )
    unknown = set(args.methods.split(",")) - set(METHODS)
    if unknown:
        raise UserError(f"There is no method {min(unknown)!r}; --methods takes {', '.join(METHODS)}.")
    if args.out:
        check_writable(args.out)
    compilation.keep_programs()
    tables = ""
    for table in (generated_tables if args.ground_truth is None else ground_truth_tables)(args):
        print(table)
        tables += table + "\n"
    if args.out:
        with replacing(args.out) as path:
            path.write_text(tables)


if __name__ == "__main__":
    main()

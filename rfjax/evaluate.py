"""Judges videos of the small world: do they show what the caption says, and do they stay as they began?

    python -m rfjax.evaluate --ground_truth 256

judges rendered clips instead of generated ones, crisp and then blurred and noisy: what the detector gets
wrong by itself.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rfjax import shapes
from rfjax.errors import UserError, exit_cleanly
from rfjax.score import report, score

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


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--ground_truth", type=int, required=True, metavar="N", help="judge N rendered clips")
    add("--seconds", type=float, default=10.0, help="length of the clips (default %(default)g)")
    add("--objects", type=int, choices=(1, 2), default=1, help="objects in a clip (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed gives other clips")
    add("--out", metavar="FILE", help="also write the tables to a Markdown file")
    return parser.parse_args(argv)


@exit_cleanly
def main(argv=None):
    args = parse(argv)
    if args.ground_truth < 1 or args.seconds < 5:
        raise UserError("Need at least one clip of 5 seconds: raise --ground_truth or --seconds.")
    world = shapes.World(objects=args.objects)
    clips = args.ground_truth, args.seconds, world, args.seed
    tables = f"## Rendered\n\n{report(ground_truth(*clips))}\n## Blurred and noisy\n\n"
    tables += report(ground_truth(*clips, damage=True))
    print(tables)
    if args.out:
        out = Path(args.out)
        unfinished = out.with_name(out.name + ".tmp")
        unfinished.write_text(tables)
        os.replace(unfinished, out)


if __name__ == "__main__":
    main()

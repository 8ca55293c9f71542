"""How streams of the small world take a new prompt: how soon it is seen, and what it costs.

    python -m rfjax.reaction --clips 16 --out reaction.md

Clips of held-out captions are streamed together for some seconds. Then the caption names another colour of the object, or another
background, and from that same moment the stream goes on once for each policy (`rfjax.change.parse`), and once without a change.
The detector says from which frame on the new colour is there, and whether all else stays.
"""

import argparse
import colorsys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rfjax import change, compilation, config, detect, rollout, sampler, shapes
from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.files import check_writable, replacing

ROOT = Path(__file__).parents[1]
POLICIES = (
    "keep,renoise:1,renoise:2,renoise:3,renoise:4,recache,recache:sink,renoise:2+recache:sink,"
    "renoise:4+recache,renoise:4+recache:sink,crossfade:2,crossfade:4"
)
BEFORE, AFTER = 9, 13  # blocks shown before the change and after it
HOLDS = 12  # frames in a row that show what is new before it counts as seen
CALM = 48  # frames compared, at the end of both parts
NONE = "(no change)"
COLUMNS = (
    "policy",
    "seen after, frames: median (last)",
    "seen, %",
    "largest difference of frames, RMS of 255",
    "longest step of the object, px",
    "same shape, %",
    "same size, %",
    "the rest, RMS of 255",
)


class Reaction(NamedTuple):
    """What one clip did."""

    seen: float  # frames after the change until the new colour is there to stay, NaN for never
    jump: float  # largest difference of two frames in a row, RMS of 255
    step: float  # the object's longest way between two frames, pixels
    shape: bool  # is it the same as before?
    size: bool
    rest: float  # what keeps its colour, RMS of 255: the background, or the object before another background


def turned(caption: str, kind: str) -> str:
    """The caption with the opposite colour for its object or its background, the next one where that is taken."""
    named = shapes.parse(caption)
    thing, count = named.objects[0], len(shapes.COLOURS)
    own, other = (thing.colour, named.background)[:: 1 if kind == "colour" else -1]
    ways = (shapes.COLOURS[(shapes.COLOURS.index(own) + turn) % count] for turn in (4, 3))
    new = next(colour for colour in ways if colour != other)
    if kind == "colour":
        return shapes.write_caption(named._replace(objects=(thing._replace(colour=new),)))
    return shapes.write_caption(named._replace(background=new))


class Forks:
    """Clips that go on from one moment as often as one likes."""

    def __init__(self, model: sampler.Sampler, captions: list[str], seed: int):
        self.model, endless = model, int(rollout.ENDLESS) * model.rollout.block_frames
        self.stream = model.latents(captions, seed, endless, recall=True)
        self._past = None
        self.before = self._take(BEFORE)
        self._saved = _copy((self.stream.state, self._past)), self.stream.model

    def after(self, captions: list[str], policy: str) -> np.ndarray:
        """The frames after the prompts change so: uint8 [B, F, H, W, 3]."""
        (self.stream.state, self._past), self.stream.model = _copy(self._saved[0]), self._saved[1]
        self.stream.change(self.model.bind(captions).text_kv, change.parse(policy))
        return self._take(AFTER)

    def _take(self, count: int) -> np.ndarray:
        return np.concatenate(list(self._frames(count)), 1)

    def _frames(self, count: int) -> Iterator[np.ndarray]:
        decoder, params = self.model.decoder, self.model.decoder_params
        for _ in range(count):
            frames, self._past = sampler.decode_block(decoder, params, next(self.stream), self._past)
            yield np.asarray(frames)


def _copy(tree):
    """What the stream may take over, while the original stays."""
    return jax.tree.map(jnp.copy, tree)


def judge(before: np.ndarray, after: np.ndarray, caption: str, kind: str, fps: float) -> Reaction:
    """One clip [F, H, W, 3] before and after its prompt became `caption`."""
    named, measures = shapes.parse(caption), detect.measure(after, fps=fps)
    then, now = detect.detect(before[-CALM:], fps=fps), detect.summarise(measures, len(after) - CALM)
    if kind == "colour":
        track = measures.tracks[0]
        there = track.seen & (colours(track.rgb) == named.objects[0].colour)
        rest = (now.texture - then.texture)[np.isfinite(now.texture) & np.isfinite(then.texture)]
    else:
        there = colours(np.nanmean(measures.backdrop, (1, 2))) == named.background
        rest = now.objects[0].rgb - then.objects[0].rgb
    runs = np.lib.stride_tricks.sliding_window_view(there, HOLDS).all(1)
    shown = np.concatenate([before[-1:], after]).astype(np.float32)
    way = np.diff(measures.tracks[0].centre, axis=0)
    way -= shapes.SPAN * np.round(way / shapes.SPAN)
    return Reaction(
        seen=float(runs.argmax()) if runs.any() else np.nan,
        jump=float(np.sqrt((np.diff(shown, axis=0) ** 2).mean((1, 2, 3))).max()),
        step=float(np.hypot(*way.T).max()),
        shape=now.objects[0].shape == then.objects[0].shape,
        size=now.objects[0].size == then.objects[0].size,
        rest=255 * float(np.sqrt(np.mean(rest**2))),
    )


def colours(rgb: np.ndarray) -> np.ndarray:
    """The names of colours [F, 3]."""
    hues = np.array([360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in rgb.tolist()])
    gaps = detect.hue_gap(hues[:, None], np.array(list(shapes.HUES.values())))
    return np.array(shapes.COLOURS)[gaps.argmin(1)]


def row(policy: str, reactions: list[Reaction]) -> str:
    """A line of the table: medians of what is measured, shares of what is true."""
    seen, jump, step, shape, size, rest = map(np.array, zip(*reactions, strict=True))
    came = seen[np.isfinite(seen)]
    soon = f"{np.median(came):.0f} ({came.max():.0f})" if came.size and policy != NONE else "–"
    share = "–" if policy == NONE else f"{100 * np.isfinite(seen).mean():.0f}"
    cells = [
        policy,
        soon,
        share,
        f"{np.median(jump):.1f}",
        f"{np.median(step):.1f}",
        f"{100 * shape.mean():.0f}",
        f"{100 * size.mean():.0f}",
        f"{np.nanmedian(rest):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def tables(args: argparse.Namespace) -> Iterator[str]:
    """A table for each kind of change."""
    settings = config.load(args.config)
    world = config.build(shapes.World, settings, "world")
    detect.check(world, sampler.sections(settings)[0].fps)
    scenes = [shapes.sample_scene(index, args.seed, world, "held_out") for index in range(args.clips)]
    captions = [shapes.caption(scene) for scene in scenes]
    model = sampler.load(settings, args.weights)
    forks, policies = Forks(model, captions, args.seed), args.policies.split(",")
    for kind in ("colour", "background"):
        lines, new = ["|---" * len(COLUMNS) + "|"], [turned(caption, kind) for caption in captions]
        for policy in tqdm([NONE, *policies], desc=kind):
            still = policy == NONE
            videos = forks.after(captions if still else new, "keep" if still else policy)
            clips = zip(forks.before, videos, new, strict=True)
            lines.append(row(policy, [judge(*clip, kind, model.video.fps) for clip in clips]))
        yield "\n".join([f"## Another {kind}\n", f"| {' | '.join(COLUMNS)} |", *lines]) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m rfjax.reaction", description=__doc__)
    add = parser.add_argument
    add("--clips", type=int, default=16, metavar="N", help="held-out captions (default %(default)s)")
    add("--policies", default=POLICIES, help="ways to change, with commas between (default %(default)s)")
    add("--config", default=str(ROOT / "configs/shapes.py"), help="Python file with get_config()")
    add("--weights", metavar="DIR", help="folder with dit.safetensors and vae.safetensors")
    add("--seed", type=int, default=0, help="another seed gives other clips")
    add("--out", metavar="FILE", help="also write the tables to a Markdown file")
    return parser.parse_args(argv)


@exit_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.clips < 1:
        raise UserError("Need at least one clip: raise --clips.")
    sampler.clip_keys(args.seed, 1)  # which says what seeds there are
    for policy in args.policies.split(","):
        change.parse(policy)
    if args.out:
        check_writable(args.out)
    compilation.keep_programs()
    report = ""
    for table in tables(args):
        print(table)
        report += table + "\n"
    if args.out:
        with replacing(args.out) as path:
            path.write_text(report)


if __name__ == "__main__":
    main()

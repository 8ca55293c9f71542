"""The judge's own error: rendered clips, different scenes, and clips damaged on purpose."""

import numpy as np
from tqdm import tqdm

from rfjax import detect, drift, score, shapes
from rfjax.evaluate import damage

FELL, KEPT = (
    0.1,
    0.05,
)  # of 1: a score that must fall loses more than the first, one that must not less than the second
LEAKS = {
    "size": 0.15,
    "edge": 0.15,
}  # the same of what the outline tells: it is found by brightness, which other colours move


def scenes(count, world, seed):
    """Scenes, half of them of each split."""
    return [shapes.sample_scene(index // 2, seed, world, shapes.SPLITS[index % 2]) for index in range(count)]


def judge(count, seconds, world, seed=0, camera=None):
    """Scores of rendered clips; `camera` (uint8 video, generator → the same) stands between them and the judge."""
    scores = []
    for index, scene in enumerate(tqdm(scenes(count, world, seed), desc="judge", unit=" clip")):
        video = shapes.render(scene, 0, round(seconds * world.fps))
        video = camera(video, np.random.default_rng((seed, index))) if camera else video
        scores.append(score.score(video, shapes.caption(scene), world.fps))
    return scores


def soft(video, rng):
    """A little blur and noise, roughly what a small VAE does to a video."""
    return damage.noisy(damage.blur(video, 0.7), rng)


def calibration(count, seed=0):
    """What the anchors of the drift score are taken from.

    Returns:
        {distance: (95 % quantile within rendered clips, mean between different scenes)};
        {motion: least dynamic degree of rendered clips}.
    """
    some = scenes(count, shapes.WORLD, seed)
    names = [[thing.name for thing in scene.things] for scene in some]
    first, last = zip(*(_halves(scene) for scene in tqdm(some, desc="calibrate", unit=" clip")), strict=True)
    own = [drift.distances(*three) for three in zip(first, last, names, strict=True)]
    other = [drift.distances(*three) for three in zip(first, (*last[1:], last[0]), names, strict=True)]
    anchors = {
        name: (np.quantile([row[name] for row in own], 0.95), np.mean([row[name] for row in other]))
        for name in drift.UNITS
    }
    dynamic = [(one[0].motion, drift.dynamic(found)) for one, found in zip(names, last, strict=True)]
    return anchors, {
        motion: min(degree for name, degree in dynamic if name == motion)
        for motion in sorted({name for name, _ in dynamic})
    }


def _halves(scene, name=None):
    """What the first and the last 5 s of a 10 s clip show, the last perhaps with a damage."""
    half = score.WINDOW * scene.world.fps
    show = damage.DAMAGES[name] if name else shapes.render
    return detect.detect(shapes.render(scene, 0, half)), detect.detect(show(scene, half, half))


def matrix(count, seed=0):
    """{damage, or "rendered", "another scene": {measure: mean over clips}}, every measure of 1 (as it was) … 0.

    A clip is 10 s long and damaged from its middle on; measures are those of `damage.MEASURES`, and the drift score.
    """
    some = scenes(count, shapes.WORLD, seed)
    rows = {"rendered": [], **{name: [] for name in damage.DAMAGES}, "another scene": []}
    for scene, other in zip(tqdm(some, desc="damage", unit=" scene"), [*some[1:], some[0]], strict=True):
        first, last = _halves(scene)
        rows["rendered"].append(kept(first, last, scene))
        rows["another scene"].append(kept(first, _halves(other)[1], scene))
        for name in damage.DAMAGES:
            rows[name].append(kept(first, _halves(scene, name)[1], scene))
    return {
        name: {key: float(np.mean([clip[key] for clip in clips])) for key in clips[0]}
        for name, clips in rows.items()
    }


def kept(first, last, scene):
    """{measure: 1 (as it was) … 0} of what a clip's last 5 s show, against its first and its scene's names."""
    named = shapes.Caption(tuple(thing.name for thing in scene.things), scene.background)
    change = drift.between(first, last, named.objects)
    right = {f"right {name}": float(value) for name, value in score.right(last, named).items()}
    parts = {name: 1 - part for name, part in drift.scaled(change["distances"]).items()}
    count = float(last.miscount < 0.5)
    return right | {"count": count} | parts | {"moving": change["moving"], "drift score": change["score"]}


def unexpected(rows):
    """Pairs (damage, measure) that fell though they must not, or did not though they must; see `damage.FALLS`."""
    wrong = []
    for name in damage.DAMAGES:
        for measure in damage.MEASURES:
            fall = rows["rendered"][measure] - rows[name][measure]
            must, may = measure in damage.FALLS[name], measure in damage.MAY_FALL[name]
            if (must and fall < FELL) or (not must and not may and fall > LEAKS.get(measure, KEPT)):
                wrong.append((name, measure))
    return wrong


def matrix_table(rows):
    """The matrix as Markdown: ↓ where the damage must lower the measure, (↓) where it may and did, ! where one of them is wrong."""
    measures, wrong = (*damage.MEASURES, "drift score"), unexpected(rows)
    lines = [f"| | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    for name, row in rows.items():
        marks = [_mark(name, key, rows["rendered"][key] - row[key]) for key in measures]
        cells = [
            f"{row[key]:.2f}{mark}{' !' * ((name, key) in wrong)}"
            for key, mark in zip(measures, marks, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mark(name, measure, fall):
    """Of a damage and a measure that fell by so much."""
    if measure in damage.FALLS.get(name, ()):
        return " ↓"
    may = measure in damage.MAY_FALL.get(name, ())
    return " (↓)" if may and fall > LEAKS.get(measure, KEPT) else ""


def calibration_table(anchors, least):
    """The calibration beside the constants that were taken from it, as Markdown."""
    lines = [
        "| distance | rendered, 95 % | counts as 0 | another scene, mean | counts as 1 |",
        "|---" * 5 + "|",
    ]
    for name, (own, other) in anchors.items():
        low, high = drift.ANCHORS[name]
        unit = drift.UNITS[name]
        lines.append(f"| {name} ({unit}) | {own:.2f} | {low:g} | {other:.1f} | {high:g} |")
    lines += ["", "| motion | least dynamic degree, rendered | counts as moving |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {drift.LEAST[name]:g} |" for name, value in least.items()]
    return "\n".join(lines)

"""Scores of small-world videos against their captions, and their drift from their own first seconds."""

import itertools

import numpy as np

from rfjax import detect, shapes

APPEARANCE = ("shape", "colour", "size", "background")
ATTRIBUTES = (*APPEARANCE, "motion")
WINDOW = 5  # seconds judged at the start and at the end
REFERENCE = 2  # seconds at the start that drift is measured against
DRIFTS = {  # what the caption leaves free: how far a second is from the clip's start
    "hue": "degrees",
    "colour": "RMS of 255",
    "radius": "%",
    "contrast": "% lightness",
    "pattern": "changed",
    "stripe_angle": "degrees",
    "background_hue": "degrees",
    "background": "RMS of 255",
}


def score(video, caption, fps=16):
    """What a clip gets right, and how it drifts.

    Args:
        video: uint8 [F, 64, 64, 3], at least a second; 5 s or more to judge the motion.
        caption: in the small world's words; a size it leaves out is not judged.

    Returns:
        dict of
            first, last: {attribute: bool} over the first and the last 5 s, for every one of `ATTRIBUTES`;
            seconds: {attribute: bool [S]} for every second, without motion;
            drift: {measure: float [S]} for every second, units in `DRIFTS`, NaN where nothing can be said.

    Raises:
        UserError: not a caption of the small world.
    """
    named = shapes.parse(caption)
    measures = detect.measure(video, len(named.objects), fps)
    window, frames = round(WINDOW * fps), len(video)
    starts = [round(second * fps) for second in range(max(1, int(frames / fps)))]
    seconds = [detect.summarise(measures, start, start + round(fps)) for start in starts]
    right = [_right(found, named, APPEARANCE) for found in seconds]
    reference = detect.summarise(measures, 0, round(REFERENCE * fps))
    drift = [_drift(found, reference) for found in seconds]
    return {
        "first": _right(detect.summarise(measures, 0, window), named, ATTRIBUTES),
        "last": _right(detect.summarise(measures, max(0, frames - window)), named, ATTRIBUTES),
        "seconds": {name: np.array([row[name] for row in right]) for name in right[0]},
        "drift": {name: np.array([row[name] for row in drift]) for name in DRIFTS},
    }


def _right(found, named, attributes):
    """{attribute: is it right for every object?}, under the assignment of objects that gets most right."""
    said = [name for name in attributes if any(getattr(one, name, None) for one in named.objects)]

    def judge(objects):
        pairs = list(zip(objects, named.objects, strict=True))
        return {
            name: [getattr(one, name) in (None, getattr(seen, name)) for seen, one in pairs] for name in said
        }

    judged = [judge(order) for order in itertools.permutations(found.objects)]
    right = max(judged, key=lambda rows: sum(map(sum, rows.values())))
    return {name: all(row) for name, row in right.items()} | {
        "background": found.background == named.background
    }


def _drift(found, reference):
    """{measure: distance of a second from the clip's start}, the mean over objects."""
    rows = [_object_drift(*pair) for pair in zip(found.objects, reference.objects, strict=True)]
    drift = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    seen = np.isfinite(found.texture) & np.isfinite(reference.texture)
    gap = (found.texture - reference.texture)[seen]
    return drift | {
        "background_hue": float(detect.hue_gap(found.background_hue, reference.background_hue)),
        "background": 255 * float(np.sqrt(np.mean(gap**2))) if gap.size else np.nan,
    }


def _object_drift(now, then):
    lost = now.pattern is None or then.pattern is None
    upright = now.pattern == then.pattern == "stripes" and "spinning" not in (now.motion, then.motion)
    turn = abs((now.stripe_angle - then.stripe_angle + np.pi / 2) % np.pi - np.pi / 2)
    return {
        "hue": float(detect.hue_gap(now.hue, then.hue)),
        "colour": 255 * float(np.sqrt(np.mean((now.rgb - then.rgb) ** 2))),
        "radius": 100 * abs(np.log(now.radius / then.radius)),
        "contrast": 100 * abs(now.contrast - then.contrast),
        "pattern": np.nan if lost else float(now.pattern != then.pattern),
        "stripe_angle": np.rad2deg(turn) if upright else np.nan,
    }


def report(scores):
    """Many clips' scores → two Markdown tables: shares of clips that are right, and mean drift by second."""
    return f"{_right_table(scores)}\n\n{_drift_table(scores)}\n"


def _right_table(scores):
    length = min(len(clip["seconds"]["shape"]) for clip in scores)
    lines = [f"{len(scores)} clips of {length} s or more: right, %", ""]
    lines += ["| | first 5 s | last 5 s | worst second |", "|---|---|---|---|"]
    for name in ATTRIBUTES:
        first, last = (
            [clip[part][name] for clip in scores if name in clip[part]] for part in ("first", "last")
        )
        seconds = [clip["seconds"][name][:length] for clip in scores if name in clip["seconds"]]
        worst = f"{100 * np.mean(seconds, 0).min():.1f}" if seconds else "–"
        if first:
            lines.append(f"| {name} | {100 * np.mean(first):.1f} | {100 * np.mean(last):.1f} | {worst} |")
    first, last = (100 * np.mean([all(clip[part].values()) for clip in scores]) for part in ("first", "last"))
    return "\n".join([*lines, f"| all | {first:.1f} | {last:.1f} | |"])


def _drift_table(scores):
    length = min(len(clip["drift"]["hue"]) for clip in scores)
    shown = sorted({second for second in (2, 5, 10, 20, 30, 60, 120) if second < length} | {length})
    lines = [f"Drift from the first {REFERENCE} s, mean over clips in the second that ends at", ""]
    lines += [f"| | {' | '.join(f'{second} s' for second in shown)} |", "|---" * (len(shown) + 1) + "|"]
    for name, unit in DRIFTS.items():
        values = np.array([clip["drift"][name][:length] for clip in scores])
        counted = np.isfinite(values).sum(0)
        mean = np.where(counted > 0, np.nansum(values, 0) / np.maximum(counted, 1), np.nan)
        cells = " | ".join(f"{mean[second - 1]:.2f}" for second in shown)
        lines.append(f"| {name.replace('_', ' ')} ({unit}) | {cells} |")
    return "\n".join(lines)

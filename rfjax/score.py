"""Scores of small-world videos against their captions, and their drift from their own first seconds."""

import numpy as np

from rfjax import detect, drift, shapes
from rfjax.colour import delta_e, hue_gap

APPEARANCE = ("shape", "colour", "size", "background")
ATTRIBUTES = (*APPEARANCE, "motion")
WINDOW = 5  # seconds judged at the start and at the end
REFERENCE = 2  # seconds at the start that a second is compared with
LEVELS = {  # how good a second is by itself
    "overlap with the named shape": "%",
    "error of the named colour": "ΔE",
    "objects too many or too few": "",
    "sharpness of the outline": "1/pixels",
    "speed": "pixels/s",
    "dynamic degree": "% of the object",
}
DRIFTS = {  # what the caption leaves free: how far a second is from the clip's start
    "hue": "degrees",
    "colour": "ΔE",
    "radius": "%",
    "contrast": "% lightness",
    "pattern": "changed",
    "stripe_angle": "degrees",
    "background_hue": "degrees",
    "background": "ΔE",
}
KEPT = {  # motion of the last 5 s against the first; what the named motion has none of is not told
    "speed": "% changed",
    "heading": "degrees",
    "orbit radius": "% changed",
    "turning rate": "% changed",
}


def score(video, caption, fps=16):
    """What a clip gets right, how good its seconds are, and how it drifts.

    Args:
        video: uint8 [F, 64, 64, 3], at least a second; 5 s or more to judge the motion, 10 s for the drift score.
        caption: in the small world's words; a size it leaves out is not judged.

    Returns:
        dict of
            first, last: {attribute: bool} over the first and the last 5 s, for every one of `ATTRIBUTES`;
            seconds: {attribute: bool [S]} for every second, without motion;
            level: {measure: float [S]} for every second, units in `LEVELS`;
            drift: {measure: float [S]} for every second, units in `DRIFTS`;
            kept: {measure: float}, units in `KEPT`;
            change: the last 5 s against the first, see `rfjax.drift.between`.
        NaN where nothing can be said.

    Raises:
        UserError: not a caption of the small world.
    """
    named = shapes.parse(caption)
    measures = detect.measure(video, len(named.objects), fps)
    window, frames = round(WINDOW * fps), len(video)
    starts = [round(second * fps) for second in range(max(1, int(frames / fps)))]
    found = [detect.summarise(measures, start, start + round(fps)) for start in starts]
    first = detect.summarise(measures, 0, window)
    last = detect.summarise(measures, max(0, frames - window))
    reference = detect.summarise(measures, 0, round(REFERENCE * fps))
    order = drift.order(first, named.objects)
    found = [drift.arranged(second, order) for second in found]
    begins, ends, reference = (drift.arranged(span, order) for span in (first, last, reference))
    return {
        "first": right(first, named),
        "last": right(last, named),
        "seconds": _by_name([right(second, named, APPEARANCE) for second in found]),
        "level": _by_name([_levels(second, named) for second in found]),
        "drift": _by_name([_drift(second, reference) for second in found]),
        "kept": _kept(begins, ends, named.objects),
        "change": drift.between(begins, ends, named.objects),
    }


def _by_name(rows):
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def right(found, named, attributes=ATTRIBUTES):
    """{attribute: is it as the caption says for every object?}, under the assignment of objects that gets most right."""
    said = [
        name for name in attributes if any(getattr(one, name, None) for one in named.objects)
    ]  # no object has a background
    found = drift.arranged(found, drift.order(found, named.objects, said))
    pairs = list(zip(found.objects, named.objects, strict=True))
    judged = {
        name: all(getattr(one, name) in (None, getattr(seen, name)) for seen, one in pairs) for name in said
    }
    return judged | {"background": found.background == named.background}


def _levels(found, named):
    """{measure: value} of one second, mean over objects."""
    pairs = list(zip(found.objects, named.objects, strict=True))
    rgb = [shapes.object_rgb(one.colour, shapes.HUES[one.colour]) for one in named.objects]
    gaps = [delta_e(seen.rgb, wanted) for (seen, _), wanted in zip(pairs, rgb, strict=True)]
    overlaps = [seen.overlaps[shapes.SHAPES.index(one.shape)] for seen, one in pairs]
    values = (
        100 * np.mean(np.nan_to_num(overlaps)),
        np.mean(gaps),
        found.miscount,
        np.mean([seen.edge for seen, _ in pairs]),
        np.mean([seen.path.speed for seen, _ in pairs]),
        100 * drift.dynamic(found),
    )
    return dict(zip(LEVELS, map(float, values), strict=True))


def _drift(found, reference):
    """{measure: distance of a second from the clip's start}, the mean over objects."""
    rows = [_object_drift(*pair) for pair in zip(found.objects, reference.objects, strict=True)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    seen = np.isfinite(found.texture) & np.isfinite(reference.texture)
    gap = delta_e(*(one.texture[seen].reshape(-1, 3) for one in (found, reference)))
    return means | {
        "background_hue": float(hue_gap(found.background_hue, reference.background_hue)),
        "background": float(gap.mean()) if gap.size else np.nan,
    }


def _object_drift(now, then):
    lost = now.pattern is None or then.pattern is None
    upright = now.pattern == then.pattern == "stripes" and "spinning" not in (now.motion, then.motion)
    turn = abs((now.stripe_angle - then.stripe_angle + np.pi / 2) % np.pi - np.pi / 2)
    return {
        "hue": float(hue_gap(now.hue, then.hue)),
        "colour": float(delta_e(now.rgb, then.rgb)),
        "radius": 100 * abs(np.log(now.radius / then.radius)),
        "contrast": 100 * abs(now.contrast - then.contrast),
        "pattern": np.nan if lost else float(now.pattern != then.pattern),
        "stripe_angle": np.rad2deg(turn) if upright else np.nan,
    }


def _kept(first, last, named):
    """{measure: change of the motion}, mean over the objects that it can be said of."""
    rows = [_object_kept(*triple) for triple in zip(first.objects, last.objects, named, strict=True)]
    means = {name: [row[name] for row in rows if np.isfinite(row[name])] for name in KEPT}
    return {name: float(np.mean(values)) if values else np.nan for name, values in means.items()}


def _object_kept(then, now, named):
    spins, orbits, drifts = (named.motion == name for name in ("spinning", "orbiting", "drifting"))
    before, after = then.path, now.path
    headings = [np.rad2deg(np.arctan2(*path.velocity[::-1])) for path in (before, after)]
    rates = (before.turn, after.turn) if spins else (before.orbit_rate, after.orbit_rate)
    return {
        "speed": np.nan if spins else _changed(before.speed, after.speed),
        "heading": float(hue_gap(*headings)) if drifts else np.nan,
        "orbit radius": _changed(before.orbit_radius, after.orbit_radius) if orbits else np.nan,
        "turning rate": _changed(*rates) if spins or orbits else np.nan,
    }


def _changed(before, after):
    """Relative change in %, at most 200: that of a motion that turns back."""
    return float(np.minimum(200, 100 * abs(after - before) / max(abs(before), 1e-3)))

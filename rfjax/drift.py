"""How far the end of a clip of the small world is from its beginning: one number, and the parts it is made of.

docs/drift.md defines it and says why. In short: the first 5 s and the last 5 s are described by what should not change
(colour, surface, size, form, background, motion); each part is the distance of the two descriptions, scaled so that 0 is
what rendered clips give and 1 what two different scenes give; the mean of the parts counts as much as the video still moves.
"""

import itertools

import numpy as np

from rfjax.colour import delta_e

VERSION = 2  # of the judge: scores of different ones are not to be compared
UNITS = {  # of the distances between two spans of a clip
    "colour": "ΔE",
    "surface": "% lightness",
    "size": "%",
    "shape": "% overlap",
    "edge": "% sharpness",
    "background": "ΔE",
    "motion": "%",
}
ANCHORS = {  # distance that counts as 0: 95 % of rendered clips are nearer; and as 1: two scenes' mean, or all of an edge
    "colour": (0.2, 93.0),
    "surface": (0.2, 12.0),
    "size": (0.5, 20.0),
    "shape": (0.2, 16.0),
    "edge": (5.0, 100.0),
    "background": (0.1, 33.0),
    "motion": (1.0, 66.0),
}
LEAST = {  # dynamic degree from which on a clip moves: half the least of rendered ones
    "bouncing": 0.33,
    "drifting": 0.35,
    "orbiting": 0.21,
    "spinning": 0.14,
}
SLOW = 6.0  # pixels a second: slower than anything in the world; below it a change of motion is not told
PARTS = ("colour", "surface", "size", "form", "background", "motion")


def distances(first, last, named):
    """How far a span of a clip is from an earlier one.

    Args:
        first, last: `detect.Detection` of the spans, their objects in the same order.
        named: `shapes.Named` of these objects.

    Returns:
        {name: float} of `UNITS`, the mean over objects; infinite where an object is not there.
    """
    triples = zip(first.objects, last.objects, named, strict=True)
    rows = [_object_distances(*triple) for triple in triples]
    apart = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    seen = np.isfinite(first.texture) & np.isfinite(last.texture)
    texture = delta_e(first.texture[seen].reshape(-1, 3), last.texture[seen].reshape(-1, 3))
    return apart | {"background": float(texture.mean()) if texture.size else np.inf}


def _object_distances(then, now, named):
    if not (then.area and now.area):
        return dict.fromkeys((name for name in UNITS if name != "background"), np.inf)
    best = then.overlaps.argmax()
    surfaces = (np.array([one.contrast, one.contrast * one.coherence]) for one in (then, now))
    before, after = (one.path.kept(named.motion, then.radius) for one in (then, now))
    pace = max(np.linalg.norm(before) + np.linalg.norm(after), SLOW)
    return {
        "colour": float(delta_e(then.rgb, now.rgb)),
        "surface": 100 * float(np.linalg.norm(np.subtract(*surfaces))),
        "size": 100 * abs(np.log(now.radius / then.radius)),
        "shape": 100 * max(0.0, float(then.overlaps[best] - now.overlaps[best])),
        "edge": 100 * (1 - min(then.edge, now.edge) / max(then.edge, now.edge, 1e-6)),
        "motion": 100 * float(np.linalg.norm(before - after) / pace),
    }


def scaled(apart):
    """Distances → {name: 0 … 1} between their anchors; an object that is lost is as far as can be."""

    def between(low, high, distance):
        return float(np.clip((distance - low) / (high - low), 0, 1)) if np.isfinite(distance) else 1.0

    return {name: between(*ANCHORS[name], apart[name]) for name in UNITS}


def parts(apart):
    """Distances → {part: 0 … 1}; form is the worse of shape and edge."""
    near = scaled(apart)
    near["form"] = max(near["shape"], near["edge"])
    return {name: near[name] for name in PARTS}


def dynamic(found):
    """Dynamic degree of a `Detection`: pixels that change in STEP frames, by those of its objects."""
    area = sum(one.area for one in found.objects)
    return found.changed / area if area else 0.0


def moving(found, named):
    """Whether it moves as such names do: dynamic degree over `LEAST`, 0 (frozen) … 1."""
    least = np.mean([LEAST[one.motion] for one in named])
    return float(min(1.0, dynamic(found) / least))


def between(first, last, named):
    """All of it for two spans of a clip: {"distances", "parts", "moving", "score"}; the score is 0 (as rendered) … 1."""
    apart, moves = distances(first, last, named), moving(last, named)
    found = parts(apart)
    score = 1 - moves * (1 - sum(found.values()) / len(PARTS))
    return {"distances": apart, "parts": found, "moving": moves, "score": float(score)}


def order(found, named, attributes=("shape", "colour", "size", "motion")):
    """Indices of a `Detection`'s objects, in the order in which most of the named ones' attributes are right."""

    def right(indices):
        pairs = [(found.objects[index], one) for index, one in zip(indices, named, strict=True)]
        return sum(
            getattr(one, name) in (None, getattr(seen, name)) for seen, one in pairs for name in attributes
        )

    return max(itertools.permutations(range(len(found.objects))), key=right)


def arranged(found, indices):
    """A `Detection` with its objects in this order."""
    return found._replace(objects=tuple(found.objects[index] for index in indices))

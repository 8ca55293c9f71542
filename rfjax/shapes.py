"""The small world: endless procedural videos of named shapes, each a pure function of (seed, index, split).

One or two objects move over a coloured background by simple physics. The caption names shape, colour, size
(in 70 %), motion and background. It leaves free the exact hue, the surface pattern, the background texture
and the path: a video model has to remember those from its own frames, so they are what drifts.

Lengths are in world units, 64 across the frame; x points right, y down; time is in seconds. Frame n shows
t = n / fps, in closed form, so any span of a scene of any length is rendered on its own.
"""

import colorsys
import dataclasses
import re
from typing import NamedTuple

import numpy as np

from rfjax.errors import UserError

SHAPES = ("circle", "square", "triangle", "star")
HUES = {  # degrees; names stay at least 14 degrees apart after HUE_JITTER
    "red": 0.0,
    "orange": 30.0,
    "yellow": 57.0,
    "green": 125.0,
    "cyan": 180.0,
    "blue": 222.0,
    "purple": 275.0,
    "pink": 328.0,
}
COLOURS = tuple(HUES)
RADII = {"large": 15.0, "small": 10.0}
SIZES = tuple(RADII)
MOTIONS = ("bouncing", "drifting", "orbiting", "spinning")
SPEEDS = {"bouncing": (14.0, 24.0), "drifting": (9.0, 18.0)}  # units a second
RATES = {"orbiting": (0.7, 1.4), "spinning": (0.6, 1.2)}  # radians a second
PATTERNS = ("plain", "stripes", "dots")
SPLITS = ("train", "held_out")

SPAN = 64.0  # width of the frame in world units
HUE_JITTER = 6.0  # degrees to each side
CONTRAST = 0.18  # lightness of a pattern, to each side
OUTER = {
    "circle": 1.0,
    "square": 0.88 * 2**0.5,
    "triangle": 1.3,
    "star": 1.3,
}  # circumscribed circle / radius
BOUNDS = {  # left, right, top, bottom of the upright shape around its centre, per unit of radius
    "circle": (-1.0, 1.0, -1.0, 1.0),
    "square": (-0.88, 0.88, -0.88, 0.88),
    "triangle": (-1.126, 1.126, -1.3, 0.65),
    "star": (-1.236, 1.236, -1.3, 1.052),
}


@dataclasses.dataclass(frozen=True)
class World:
    """What every scene of a data set shares."""

    size: int = 64  # pixels across a frame
    fps: int = 16
    objects: int = 1  # 1 or 2


WORLD = World()


class Named(NamedTuple):
    """What a caption says of one object; `size` is None where the caption leaves it out."""

    shape: str
    colour: str
    motion: str
    size: str | None


class Caption(NamedTuple):
    """What a caption says."""

    objects: tuple[Named, ...]
    background: str


class Thing(NamedTuple):
    """One object: its names, then what the caption leaves free."""

    name: Named  # always with its size
    says_size: bool
    hue: float  # degrees
    pattern: str
    pattern_angle: float  # radians, attached to the object
    pattern_period: float
    pattern_phase: np.ndarray  # [2] radians
    start: np.ndarray  # [2] centre at t = 0 (of the orbit for "orbiting")
    velocity: np.ndarray  # [2] units a second; bouncing and drifting
    rate: float  # radians a second; orbiting and spinning
    angle: float  # radians at t = 0; orbiting and spinning
    orbit: float  # radius of the orbit


class Scene(NamedTuple):
    """All there is to know about one endless video."""

    world: World
    things: tuple[Thing, ...]
    background: str
    background_hue: float  # degrees
    waves: np.ndarray  # [3, 3] static texture: radians per unit along x, along y, phase


# --------------------------------------------------------------------------------------------------- sampling


def held_out(shape, colour, motion):
    """Whether training never shows this combination: one colour for each (shape, motion), 1 in 8 of all."""
    code = COLOURS.index(colour) + 3 * SHAPES.index(shape) + 2 * MOTIONS.index(motion)
    return code % len(COLOURS) == 5


def sample_scene(index, seed=0, world=WORLD, split="train"):
    """Scene `index` of a split.

    Args:
        index: any non-negative int; the data set has no end.
        seed: non-negative int.
        split: "train" or "held_out" (objects whose shape, colour and motion training never combines).

    Raises:
        UserError: unknown split, or a number of objects other than 1 or 2.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if world.objects not in (1, 2):
        raise UserError(f"the world has 1 or 2 objects, not {world.objects}: set world.objects to 1 or 2")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    names = _sample_names(rng, world.objects, split)
    free = [colour for colour in COLOURS if colour not in {name.colour for name in names}]
    background = str(rng.choice(free))
    return Scene(
        world=world,
        things=tuple(_sample_thing(rng, name) for name in names),
        background=background,
        background_hue=HUES[background] + rng.uniform(-HUE_JITTER, HUE_JITTER),
        waves=_sample_waves(rng),
    )


def _sample_names(rng, count, split):
    names = []
    while len(names) < count:
        shape, colour, motion = (str(rng.choice(words)) for words in (SHAPES, COLOURS, MOTIONS))
        taken = any(colour == other.colour for other in names)
        if not taken and held_out(shape, colour, motion) == (split == "held_out"):
            names.append(Named(shape, colour, motion, str(rng.choice(SIZES))))
    return names


def _sample_thing(rng, name):
    radius = RADII[name.size]
    outer = OUTER[name.shape] * radius
    kinds = PATTERNS[1:] if (name.shape, name.motion) == ("circle", "spinning") else PATTERNS
    heading = rng.uniform(0, 2 * np.pi)
    orbit = min(SPAN / 2 - outer, 17.0) * rng.uniform(0.75, 1.0)
    reach = outer + orbit * (name.motion == "orbiting")  # keeps the whole path inside the frame
    slow, fast = RATES.get(name.motion, (0.0, 0.0))
    return Thing(
        name=name,
        says_size=bool(rng.uniform() < 0.7),
        hue=HUES[name.colour] + rng.uniform(-HUE_JITTER, HUE_JITTER),
        pattern=str(rng.choice(kinds)),
        pattern_angle=rng.uniform(0, np.pi),
        pattern_period=rng.uniform(9.0, 13.0),
        pattern_phase=rng.uniform(0, 2 * np.pi, 2),
        start=rng.uniform(reach, SPAN - reach, 2),
        velocity=rng.uniform(*SPEEDS.get(name.motion, (0.0, 0.0)))
        * np.array([np.cos(heading), np.sin(heading)]),
        rate=rng.uniform(slow, fast) * rng.choice([-1.0, 1.0]),
        angle=rng.uniform(0, 2 * np.pi),
        orbit=orbit,
    )


def _sample_waves(rng):
    heading = rng.uniform(0, 2 * np.pi, 3)
    wavenumber = 2 * np.pi / SPAN * rng.uniform(0.5, 1.6, 3)
    return np.stack(
        [wavenumber * np.cos(heading), wavenumber * np.sin(heading), rng.uniform(0, 2 * np.pi, 3)], 1
    )


# --------------------------------------------------------------------------------------------------- captions

_NOISE = re.compile(r"[^a-z ]+")
_OBJECT = re.compile(
    rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})"
)
_CAPTION = re.compile(
    rf"({_OBJECT.pattern})( and {_OBJECT.pattern})? over an? ({'|'.join(COLOURS)}) background"
)
EXAMPLE = "a large red circle bouncing over a blue background"
PROMPTS = (
    EXAMPLE,
    "a small yellow star orbiting over a purple background",
    "a large green triangle drifting over an orange background",
    "a large pink square spinning over a cyan background",
    "a small blue circle drifting over a yellow background",
    "a large orange star bouncing over a green background",
    "a small cyan square orbiting over a red background",
    "a large purple triangle spinning over a pink background",
)


def caption(scene):
    """The scene in plain English, e.g. "a large red circle bouncing over a blue background"."""
    named = [thing.name if thing.says_size else thing.name._replace(size=None) for thing in scene.things]
    return write_caption(Caption(tuple(named), scene.background))


def write_caption(named):
    """`Caption` → plain English; the inverse of `parse`."""
    phrases = [
        _with_article(
            " ".join(word for word in (thing.size, thing.colour, thing.shape, thing.motion) if word)
        )
        for thing in named.objects
    ]
    return f"{' and '.join(phrases)} over {_with_article(named.background)} background"


def _with_article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def parse(text):
    """Plain English → `Caption`; case and punctuation are forgiven.

    Raises:
        UserError: the text is not a caption of this world.
    """
    plain = " ".join(_NOISE.sub(" ", text.lower()).split())
    match = _CAPTION.fullmatch(plain)
    if match is None:
        raise UserError(f"cannot read the caption {text!r}: write it like {EXAMPLE!r}")
    objects = tuple(
        Named(shape, colour, motion, size or None) for size, colour, shape, motion in _OBJECT.findall(plain)
    )
    return Caption(objects, match.groups()[-1])


def prompts(count, seed=0, world=WORLD, split="held_out"):
    """Captions of the first `count` scenes of a split: list[str]."""
    return [caption(sample_scene(index, seed, world, split)) for index in range(count)]


# -------------------------------------------------------------------------------------------------- rendering


def object_rgb(colour, hue):
    """Vivid colour of an object, [3] in [0, 1], dark enough to stay below 1 in a pattern's light half."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, 0.5 if colour == "pink" else 0.78, 0.84), np.float32)


def background_rgb(hue):
    """Muted, darker colour of a background, [3] in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, 0.5, 0.4), np.float32)


def render(scene, start, frames):
    """Frames start … start + frames - 1 of a scene: uint8 [frames, size, size, 3]."""
    size = scene.world.size
    axis = ((np.arange(size) + 0.5) * (SPAN / size)).astype(np.float32)
    seconds = (start + np.arange(frames, dtype=np.float64)) / scene.world.fps
    video = np.empty((frames, size, size, 3), np.float32)
    video[:] = 255 * _backdrop(scene, axis)
    for thing in scene.things:
        _paint(video, thing, axis, seconds, SPAN / size)
    return (video + 0.5).astype(np.uint8)


def pose(thing, seconds):
    """Where an object is: seconds [F] → centre [F, 2], angle [F]. Drifting centres wrap around the frame."""
    seconds = np.asarray(seconds, np.float64)
    still = np.zeros_like(seconds)
    if thing.name.motion == "spinning":
        return np.broadcast_to(thing.start, (len(seconds), 2)), thing.angle + thing.rate * seconds
    if thing.name.motion == "orbiting":
        turn = thing.angle + thing.rate * seconds
        return thing.start + thing.orbit * np.stack([np.cos(turn), np.sin(turn)], -1), still
    path = thing.start + thing.velocity * seconds[:, None]
    if thing.name.motion == "drifting":
        return path % SPAN, still
    left, right, top, bottom = (RADII[thing.name.size] * side for side in BOUNDS[thing.name.shape])
    low, high = np.array([-left, -top]), SPAN - np.array([right, bottom])
    room = high - low  # a bounce is a triangle wave between low and high
    return high - np.abs((path - low) % (2 * room) - room), still


def _backdrop(scene, axis):
    kx, ky, phase = scene.waves.astype(np.float32).T[:, :, None, None]
    light = 1 + 0.06 * np.sin(kx * axis[None, None, :] + ky * axis[None, :, None] + phase).sum(0)
    return background_rgb(scene.background_hue) * light[..., None]


def _paint(video, thing, axis, seconds, pixel):
    """Draws one object over video [F, H, W, 3] in place, with an edge about one pixel soft."""
    centre, angle = (values.astype(np.float32) for values in pose(thing, seconds))
    dx = axis[None, None, :] - centre[:, 0, None, None]
    dy = axis[None, :, None] - centre[:, 1, None, None]
    if thing.name.motion == "drifting":  # the frame is a torus: look at the nearest copy
        dx -= SPAN * np.round(dx / SPAN)
        dy -= SPAN * np.round(dy / SPAN)
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx  # the object's own axes
    cover = np.clip(0.5 - signed_distance(thing.name.shape, x, y, RADII[thing.name.size]) / pixel, 0, 1)
    colour = (255 * object_rgb(thing.name.colour, thing.hue)) * _surface(thing, x, y)[..., None]
    video += cover[..., None] * (colour - video)


def signed_distance(shape, x, y, radius):
    """Distance to the upright shape's edge lines, negative inside. Any x, y that broadcast."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    x = np.abs(x)
    if shape == "triangle":
        return np.maximum(0.8660254 * x - 0.5 * y, y) - 0.65 * radius
    # Five-pointed star: mirror every sector on the one around the top point, measure to its one slanted edge.
    for mirror_x, mirror_y in ((0.80901699, 0.58778525), (-0.80901699, 0.58778525)):
        over = 2 * np.maximum(mirror_x * x + mirror_y * y, 0)
        x, y = x - over * mirror_x, y - over * mirror_y
    tip, notch = 1.3 * radius, 0.65 * radius
    along = np.array(
        [notch * 0.58778525, tip - notch * 0.80901699], np.float32
    )  # from the tip down to the notch
    normal_x, normal_y = along[1] / np.hypot(*along), -along[0] / np.hypot(*along)
    return normal_x * np.abs(x) + normal_y * (y + tip)


def _surface(thing, x, y):
    """Lightness of the surface at the object's own coordinates: float32, 1 ± CONTRAST."""
    if thing.pattern == "plain":
        return np.ones_like(x)
    cos, sin = np.float32(np.cos(thing.pattern_angle)), np.float32(np.sin(thing.pattern_angle))
    scale = np.float32(2 * np.pi / thing.pattern_period / (1.3 if thing.pattern == "dots" else 1.0))
    phase_u, phase_v = thing.pattern_phase.astype(np.float32)
    wave = np.sin(scale * (cos * x + sin * y) + phase_u)
    if thing.pattern == "dots":
        wave = wave + np.sin(scale * (cos * y - sin * x) + phase_v) - np.float32(0.6)
    return 1 + np.float32(CONTRAST) * np.clip(
        2 * wave, -1, 1
    )  # clipping turns waves into bands with soft edges

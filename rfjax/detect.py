"""An analytic detector for the small world: what a clip shows, found without any network.

Objects are brighter than every background, so the brightest channel separates them. A span of frames is
measured frame by frame (`measure`), and any part of it summarised (`summarise`):

- place: the mask's mean on the torus, exact under translation, even for an object split by the frame's edge;
- shape: best overlap (intersection over union) with rendered masks of every shape, radius and rotation;
- size: the mask's area; colours: the hue of the mean colour, and the nearest name;
- motion: a resting place spins or is still; a straight path, unwrapped, drifts; of the others, the heading θ
  of a bouncing object keeps cos 2θ (a wall flips one component), that of an orbiting one takes all values (`motion`);
- pattern: lightness contrast inside the mask, and whether its gradient has one direction (stripes) or not.
"""

import colorsys
import functools
from typing import NamedTuple

import numpy as np

from rfjax import motion, shapes
from rfjax.colour import hue_gap, hues
from rfjax.errors import UserError

RADII = np.array([8.5, 10.0, 12.2, 15.0, 18.0])  # of the templates; the middle one splits small from large
SEEN = 0.12  # least brightness of an object above its background, of 1
MATCH = 0.7  # least mean overlap with a shape to call it one
SIDE = int(shapes.SPAN)
RATE = 16  # frames a second: motion is seen over STEP of them
PLAIN = 0.06  # most lightness contrast of a plain surface
DIRECTED = 0.65  # least coherence of the lightness gradient of stripes
CHANGE = 24  # of 255: least change of a pixel in STEP frames that counts as motion
CHUNK = 80  # frames measured at a time, for memory's sake


class Track(NamedTuple):
    """One object, frame by frame."""

    seen: np.ndarray  # bool [F]
    clear: np.ndarray  # bool [F], no other object touches it
    centre: np.ndarray  # [F, 2] x, y in pixels, modulo the frame
    area: np.ndarray  # [F] pixels
    overlap: np.ndarray  # [F, shapes, radii] best over rotations
    rgb: np.ndarray  # [F, 3] mean colour in [0, 1]
    contrast: np.ndarray  # [F] standard deviation of the lightness, relative
    grain: np.ndarray  # [F, 3] lightness gradient: energy, and (cos, sin) of twice its direction times energy
    edge: np.ndarray  # [F] sharpness of the outline, a pixel: 1 / its width
    bright: np.ndarray  # [F, H, W] brightness times mask, for the rotation
    evidence: np.ndarray  # [F, H, W] 1 on the object, -1 on the background, 0 where another may hide it


class Measures(NamedTuple):
    """A span of frames, measured."""

    tracks: tuple[Track, ...]
    backdrop: np.ndarray  # float32 [F, H, W, 3] in [0, 1], NaN under and near the objects
    count: np.ndarray  # [F] separate objects
    changed: np.ndarray  # [F] pixels that change in the next STEP frames; NaN in the last STEP
    fps: float


def check(world: shapes.World, fps: float) -> None:
    """UserError for a world that is not judged, or for clips of it that show another number of frames a second."""
    if world.size != SIDE:
        raise UserError(f"config.world.size is {world.size}, but clips are judged at {SIDE}: set it so.")
    if not world.fps == fps == RATE:
        raise UserError(
            f"The config has {fps:g} frames a second, in a world of {world.fps:g}, but clips are judged at {RATE}: set "
            "config.video.fps and config.world.fps so."
        )


class Found(NamedTuple):
    """One object over a span. Names are None where nothing fits."""

    shape: str | None
    colour: str | None
    size: str | None
    motion: str | None  # "still" where it neither moves nor turns
    hue: float  # degrees
    rgb: np.ndarray  # [3] mean colour
    radius: float  # of the best template
    pattern: str | None
    contrast: float
    coherence: float  # of the surface's gradient: 1 where it has one direction
    stripe_angle: float  # radians modulo π, across the stripes; of use where they do not spin
    overlaps: np.ndarray  # [shapes] mean intersection over union with the best template of each shape
    edge: float  # sharpness of its outline, a pixel
    area: float  # pixels
    path: motion.Path


class Detection(NamedTuple):
    """What a span of frames shows."""

    objects: tuple[Found, ...]
    background: str | None
    background_hue: float  # degrees
    texture: np.ndarray  # [H, W, 3] mean background, NaN where never seen
    miscount: float  # separate objects too many or too few, mean over the frames in which they do not touch
    changed: float  # pixels that change in STEP frames, mean over the frames


NOTHING = Found(
    shape=None,
    colour=None,
    size=None,
    motion=None,
    hue=np.nan,
    rgb=np.full(3, np.nan),
    radius=np.nan,
    pattern=None,
    contrast=np.nan,
    coherence=np.nan,
    stripe_angle=np.nan,
    overlaps=np.full(len(shapes.SHAPES), np.nan),
    edge=np.nan,
    area=0.0,
    path=motion.NOWHERE,
)


def detect(video, objects=1, fps=16):
    """What a span of frames shows: uint8 [F, 64, 64, 3] → Detection. Motion needs about 5 s."""
    return summarise(measure(video, objects, fps))


# --------------------------------------------------------------------------------------------- frame by frame


def measure(video, objects=1, fps=16):
    """Measures every frame of uint8 [F, 64, 64, 3], looking for `objects` (1 or 2) of them."""
    names = _commonest_hues(video[:CHUNK]) if objects == 2 else None
    chunks = [_measure(video[start : start + CHUNK], names) for start in range(0, len(video), CHUNK)]
    backdrops, counts, tracks = zip(*chunks, strict=True)
    joined = [Track(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*tracks, strict=True)]
    changed = _changed(np.asarray(video))
    return Measures(tuple(joined), np.concatenate(backdrops), np.concatenate(counts), changed, fps)


def _changed(video):
    changed = np.full(len(video), np.nan)
    for frame, (now, then) in enumerate(zip(video, video[motion.STEP :], strict=False)):
        changed[frame] = (np.maximum(now, then) - np.minimum(now, then) > CHANGE).any(-1).sum()
    return changed


def _measure(video, names):
    """Frames and the two objects' hues (None where there is one object) → backdrop, count, tracks."""
    video, bright, mask, visible = _segment(video)
    backdrop = np.where(_spread(mask, 3, np.maximum)[..., None] > 0, np.nan, video)
    count = np.where(visible, _components(mask > 0.5), 0)
    if names is None:
        alone = np.ones(len(mask), bool)
        return backdrop, count, [_track(video, bright, mask, visible, alone, 2 * mask - 1)]
    gaps = [hue_gap(hues(video), hue) for hue in names]
    nearer = gaps[0] < gaps[1]
    first, second = mask * nearer, mask * ~nearer
    touch = (_spread(first, 1, np.maximum) * _spread(second, 1, np.maximum)).max((1, 2)) > 0.5
    both = (first, second), (second, first)
    tracks = [_track(video, bright, part, visible, ~touch, 2 * part - 1 + other) for part, other in both]
    return backdrop, count, tracks


def _segment(video):
    """uint8 [F, H, W, 3] → float32 the same, brightness, soft mask [F, H, W], any object there? [F]."""
    video = np.asarray(video, np.float32) / 255
    bright = video.max(-1)
    low, high = np.percentile(bright, (50, 97.5), axis=(1, 2))[:, :, None, None]
    edge = low + 0.33 * (high - low)  # the dark half of a pattern stays above it
    mask = np.clip((bright - edge) / (0.16 * (high - low) + 1e-6) + 0.5, 0, 1)
    return video, bright, mask, (high - low)[:, 0, 0] > SEEN


def _components(mask):
    """Separate things in bool masks [F, H, W] on the torus, from their Euler number (vertices - edges + faces): none has a hole."""
    mask = _spread(_spread(mask, 1, np.minimum), 1, np.maximum)  # specks are no things
    wide, tall = mask | np.roll(mask, 1, 2), mask | np.roll(mask, 1, 1)
    corner = wide | np.roll(wide, 1, 1)
    return sum(sign * part.sum((1, 2)) for sign, part in ((1, corner), (-1, wide), (-1, tall), (1, mask)))


def _commonest_hues(video):
    """Hues of the two commonest colour names among the objects' pixels."""
    video, _, mask, _ = _segment(video)
    counts = np.bincount(_nearest_hue(hues(video[mask > 0.9])), minlength=len(shapes.COLOURS))
    return [shapes.HUES[shapes.COLOURS[index]] for index in np.argsort(counts)[-2:]]


def _track(video, bright, mask, visible, clear, evidence):
    area = mask.sum((1, 2))
    seen = visible & (area > 60)
    centre = _torus_mean(mask, area)
    core = _spread(mask, 2, np.minimum) > 0.9
    weight = core / np.maximum(core.sum((1, 2)), 1)[:, None, None]
    rgb = np.einsum("fhw,fhwc->fc", weight, video)
    light = bright / np.maximum((weight * bright).sum((1, 2)), 1e-3)[:, None, None] - 1
    contrast = np.sqrt((weight * light**2).sum((1, 2)))
    dx = (np.roll(light, -1, 2) - np.roll(light, 1, 2)) / 2
    dy = (np.roll(light, -1, 1) - np.roll(light, 1, 1)) / 2
    grain = [(weight * part).sum((1, 2)) for part in (dx**2 + dy**2, dx**2 - dy**2, 2 * dx * dy)]
    overlap = _overlaps(_centred(mask, centre), area)
    return Track(
        seen=seen,
        clear=clear,
        centre=centre,
        area=area,
        overlap=overlap,
        rgb=rgb,
        contrast=contrast,
        grain=np.stack(grain, 1),
        edge=_sharpness(bright, mask),
        bright=bright * mask,
        evidence=evidence,
    )


def _sharpness(bright, mask):
    """Gradient energy of the brightness at the outline by its step and length, Σ|∇|² / (step Σ|∇|): 1 / width in pixels [F].

    0 where nothing has an inside that is brighter than what is around it.
    """
    inside, around = _spread(mask, 2, np.minimum) > 0.9, _spread(mask, 2, np.maximum) > 0.1
    step = _mean(bright, inside) - _mean(bright, ~around)
    dx = (np.roll(bright, -1, 2) - np.roll(bright, 1, 2)) / 2
    dy = (np.roll(bright, -1, 1) - np.roll(bright, 1, 1)) / 2
    slope = np.where(around & ~inside, np.hypot(dx, dy), 0)
    slope[:, [0, -1]] = slope[:, :, [0, -1]] = 0  # the picture's rim is no outline
    length = step * slope.sum((1, 2))
    return np.where(length > 1e-6, (slope**2).sum((1, 2)) / np.maximum(length, 1e-6), 0)


def _mean(image, where):
    return (image * where).sum((1, 2)) / np.maximum(where.sum((1, 2)), 1)


def _spread(mask, reach, extreme):
    """Largest or smallest value within a square of side 2·reach + 1, on the torus: [F, H, W] → same."""
    for axis in (1, 2):
        out = mask
        for shift in range(-reach, reach + 1):
            out = extreme(out, np.roll(mask, shift, axis))
        mask = out
    return mask


def _torus_mean(mask, area):
    turn = np.exp(2j * np.pi * (np.arange(SIDE) + 0.5) / SIDE)
    mean = np.stack([mask.sum(1) @ turn, mask.sum(2) @ turn], -1) / np.maximum(area, 1)[:, None]
    return np.angle(mean) * SIDE / (2 * np.pi) % SIDE


def _centred(mask, centre):
    """Moves every mask's centre to the middle of the frame, by less than pixels, around the torus."""
    frequency = np.fft.fftfreq(SIDE)
    shift_x, shift_y = (
        np.exp(2j * np.pi * (centre[:, axis, None] - SIDE / 2) * frequency) for axis in (0, 1)
    )
    return np.fft.ifft2(np.fft.fft2(mask) * shift_y[:, :, None] * shift_x[:, None, :]).real.astype(np.float32)


def _overlaps(mask, area):
    """Intersection over union with the templates: centred masks [F, H, W] → [F, shapes, radii]."""
    pixels, owner = _templates()
    both = mask.reshape(len(mask), -1) @ pixels
    ratio = both / (area[:, None] + pixels.sum(0) - both)
    best = [ratio[:, owner == index].max(1) for index in range(owner.max() + 1)]
    return np.stack(best, 1).reshape(len(mask), len(shapes.SHAPES), len(RADII))


@functools.cache
def _templates():
    """Masks [H·W, N] of every shape, radius and rotation, and the index [N] of shape and radius."""
    kinds = [(shape, radius) for shape in shapes.SHAPES for radius in RADII]
    masks = [_rotations(shape, radius) for shape, radius in kinds]
    owner = np.repeat(np.arange(len(kinds)), [len(mask) for mask in masks])
    pixels = np.concatenate(masks)
    return pixels.reshape(len(pixels), -1).T.copy(), owner


def _rotations(shape, radius):
    """Masks [N, H, W] of a shape in all rotations, its centre (as `_torus_mean` has it) amid the frame."""
    period, count = {"circle": (0, 1), "square": (90, 8), "triangle": (120, 10), "star": (72, 8)}[shape]
    angle = np.deg2rad(period / count * np.arange(count))[:, None, None]
    axis = np.arange(SIDE) + 0.5 - SIDE / 2
    x = np.cos(angle) * axis[None, None, :] + np.sin(angle) * axis[None, :, None]
    y = np.cos(angle) * axis[None, :, None] - np.sin(angle) * axis[None, None, :]
    masks = np.clip(0.5 - shapes.signed_distance(shape, x, y, radius), 0, 1)
    return _centred(masks, _torus_mean(masks, masks.sum((1, 2))))


# ------------------------------------------------------------------------------------------------ over a span


def summarise(measures, start=0, stop=None):
    """What frames start … stop - 1 show: Measures → Detection."""
    span = slice(start, stop)
    backdrop = measures.backdrop[span]
    counted = np.isfinite(backdrop).sum(0)
    texture = np.where(counted > 0, np.nansum(backdrop, 0) / np.maximum(counted, 1), np.nan)
    rgb = texture[counted.any(-1)].mean(0) if counted.any() else np.zeros(3)
    hue, grey = _hue(rgb), np.ptp(rgb) < 0.1 * rgb.max() or not rgb.any()
    tracks = [Track(*(part[span] for part in track)) for track in measures.tracks]
    objects = tuple(_found(track, measures.fps) for track in tracks)
    name = None if grey else shapes.COLOURS[_nearest_hue(hue)]
    apart = np.all([track.clear for track in tracks], 0)  # objects that touch are counted as one
    gaps = np.abs(measures.count[span][apart] - len(tracks))
    miscount = float(gaps.mean()) if gaps.size else np.nan
    changed = measures.changed[span][np.isfinite(measures.changed[span])]
    return Detection(objects, name, hue, texture, miscount, float(changed.mean()) if changed.size else np.nan)


def _found(track, fps):
    if track.seen.mean() < 0.5:
        return NOTHING
    seen = track.seen & track.clear
    if seen.sum() < 8:  # always behind or over the other object: trust the frames that show most of it
        seen = track.seen & (track.area >= np.percentile(track.area[track.seen], 80))
    overlap = track.overlap[seen].mean(0).max(1)
    shape = shapes.SHAPES[overlap.argmax()]
    radius = float(np.sqrt(np.median(track.area[seen]) / _unit_areas()[shape]))
    rgb = track.rgb[seen].mean(0)
    hue = _hue(rgb)
    contrast = float(track.contrast[seen].mean())
    pattern, coherence, stripe_angle = _pattern(contrast, track.grain[seen])
    name, path = motion.follow(_placed(track, shape, radius), track.seen, track.bright, track.area, fps)
    return Found(
        shape=shape if overlap.max() > MATCH else None,
        colour=shapes.COLOURS[_nearest_hue(hue)],
        size=min(shapes.SIZES, key=lambda size: abs(np.log(radius / shapes.RADII[size]))),
        motion=name,
        hue=hue,
        rgb=rgb,
        radius=radius,
        pattern=pattern,
        contrast=contrast,
        coherence=coherence,
        stripe_angle=stripe_angle,
        overlaps=overlap,
        edge=float(track.edge[seen].mean()),
        area=float(track.area[seen].mean()),
        path=path,
    )


def _placed(track, shape, radius):
    """Centres [F, 2], where the object is partly hidden those at which its whole shape agrees best."""
    hidden = ~track.clear
    spectrum = np.fft.rfft2(track.evidence[hidden])
    best = np.full(len(spectrum), -np.inf)
    centre = track.centre.copy()
    for mask in _rotations(shape, radius):
        match = np.fft.irfft2(spectrum * np.fft.rfft2(mask).conj())
        row, column = np.divmod(match.reshape(-1, SIDE * SIDE).argmax(1), SIDE)
        frame = np.arange(len(match))
        better = match[frame, row, column] > best
        best = np.where(better, match[frame, row, column], best)
        x = column + motion.vertex(*(match[frame, row, (column + side) % SIDE] for side in (-1, 0, 1)))
        y = row + motion.vertex(*(match[frame, (row + side) % SIDE, column] for side in (-1, 0, 1)))
        placed = (np.stack([x, y], 1) + SIDE / 2) % SIDE
        centre[hidden] = np.where(better[:, None], placed, centre[hidden])
    return centre


@functools.cache
def _unit_areas():
    """Area of every shape of radius 1, from its templates."""
    pixels, owner = _templates()
    area = pixels.sum(0)
    index = {shape: owner == i * len(RADII) + len(RADII) - 1 for i, shape in enumerate(shapes.SHAPES)}
    return {shape: area[own].mean() / RADII[-1] ** 2 for shape, own in index.items()}


def _pattern(contrast, grain):
    """Lightness contrast and gradients [F, 3] → (name, coherence, stripe angle)."""
    energy, along, across = grain.T
    directed = float((np.hypot(along, across) / np.maximum(energy, 1e-9)).mean())
    name = "plain" if contrast < PLAIN else "stripes" if directed > DIRECTED else "dots"
    return name, directed, float(np.arctan2(across.sum(), along.sum()) / 2 % np.pi)


# ---------------------------------------------------------------------------------------------------- colours


def _hue(rgb):
    return 360 * colorsys.rgb_to_hsv(*map(float, rgb))[0]


def _nearest_hue(hue):
    """Index of the nearest colour name."""
    return hue_gap(np.asarray(hue)[..., None], np.array(list(shapes.HUES.values()))).argmin(-1)

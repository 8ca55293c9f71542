"""How a tracked object moves: its path's name, and the numbers that its physics keeps constant."""

from typing import NamedTuple

import numpy as np

STEP = 6  # frames between which displacement and rotation are taken
STILL = 2.0  # least displacement of a moving object in STEP frames, pixels
BINS = 96  # angles of the polar samples
LIMIT = 9  # greatest turn in STEP frames, in bins: less than half the period of a star
ORBIT = 12.0  # pixels: an orbit's usual radius, which weighs its rate against its speed


class Path(NamedTuple):
    """Motion over a span of frames; each of the world's motions keeps some of these."""

    speed: float  # of the centre, pixels a second
    velocity: np.ndarray  # [2] mean, pixels a second: what drifting keeps
    folded: np.ndarray  # [2] median of |vx| and |vy|: what bouncing keeps
    orbit_rate: float  # radians a second by which the heading turns: with the speed, what orbiting keeps
    turn: float  # radians a second about its own centre, 0 unless it rests: what spinning keeps

    @property
    def orbit_radius(self):
        """Pixels; what a circle walked at this speed and rate has."""
        return self.speed / max(abs(self.orbit_rate), 1e-3)

    def kept(self, motion, radius):
        """What a motion's physics keeps constant, as a vector in pixels a second; `radius` of the object."""
        return {
            "drifting": self.velocity,
            "bouncing": self.folded,
            "orbiting": np.array([self.speed, ORBIT * self.orbit_rate]),
            "spinning": np.array([radius * self.turn]),
        }[motion]


NOWHERE = Path(np.nan, np.full(2, np.nan), np.full(2, np.nan), np.nan, np.nan)


def follow(centre, seen, bright, area, fps):
    """What a span of frames tells of an object's motion.

    Args:
        centre: [F, 2] x, y on the torus, pixels.
        seen: bool [F].
        bright: [F, H, W] brightness on the object, 0 elsewhere.
        area: [F] pixels.

    Returns:
        name of the motion, "still", or None for a path that is none of them; and its `Path`.
    """
    side = bright.shape[-1]
    pairs = seen[STEP:] & seen[:-STEP]
    if pairs.sum() < STEP:
        return None, NOWHERE
    step = (centre[STEP:] - centre[:-STEP])[pairs]
    step -= side * np.round(step / side)
    length = np.hypot(*step.T)
    rests = np.median(length) < STILL
    turn = _turning(centre, seen, bright, area, pairs, fps) if rests else 0.0
    heading = np.arctan2(step[:, 1], step[:, 0])
    turns = np.angle(np.exp(1j * (heading[STEP:] - heading[:-STEP])))
    second = fps / STEP
    path = Path(
        speed=second * float(np.median(length)),
        velocity=second * step.mean(0),
        folded=second * np.median(np.abs(step), 0),
        orbit_rate=second * float(np.median(turns)) if len(turns) else 0.0,
        turn=turn,
    )
    if rests:
        return "spinning" if abs(turn) > 0.4 else "still", path
    return _name(step, length, heading, turns), path


def _name(step, length, heading, turns):
    if np.hypot(*step.sum(0)) > 0.8 * length.sum():
        return "drifting"
    flips = np.cos(2 * heading)
    if np.median(np.abs(flips - np.median(flips))) < 0.3:
        return "bouncing"
    return "orbiting" if abs(turns.sum()) > 0.7 * np.abs(turns).sum() else None


def _turning(centre, seen, bright, area, pairs, fps):
    """Radians a second by which an object at rest turns: the best shift between its polar samples."""
    side = bright.shape[-1]
    x, y = np.angle(np.exp(2j * np.pi * centre[seen] / side).mean(0)) * side / (2 * np.pi) - 0.5
    reach = np.linspace(0.25, 1.3, 8)[:, None] * np.sqrt(np.median(area[seen]) / np.pi)
    angle = 2 * np.pi * np.arange(BINS) / BINS
    samples = _bilinear(bright, (x + reach * np.cos(angle)) % side, (y + reach * np.sin(angle)) % side)
    spectrum = np.fft.rfft(samples * reach, axis=-1)
    spectrum[..., 0] = 0
    match = np.fft.irfft((spectrum[STEP:] * spectrum[:-STEP].conj())[pairs].sum(1), BINS)
    shift = np.arange(-LIMIT, LIMIT + 1)
    peak = shift[match[:, shift].argmax(1)]
    peak = peak + vertex(*(match[np.arange(len(match)), (peak + side) % BINS] for side in (-1, 0, 1)))
    return float(np.median(peak)) * 2 * np.pi / BINS * fps / STEP


def vertex(left, top, right):
    """Where between -1 and 1 the parabola through three samples, the middle one greatest, has its vertex."""
    return (left - right) / (2 * (left - 2 * top + right) - 1e-9)


def _bilinear(images, x, y):
    """Samples [F, H, W] at pixel coordinates x, y on the torus."""
    side = images.shape[-1]
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1, fx, fy = (x0 + 1) % side, (y0 + 1) % side, x - x0, y - y0
    x0, y0 = x0 % side, y0 % side
    upper = images[:, y0, x0] * (1 - fx) + images[:, y0, x1] * fx
    lower = images[:, y1, x0] * (1 - fx) + images[:, y1, x1] * fx
    return upper * (1 - fy) + lower * fy

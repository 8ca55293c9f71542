"""Measures of any video, without weights: how sharp, how colourful, how lively each of its seconds is.

They judge change, not quality: the last 5 s of a video against its own first 5 s.
"""

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from rfjax import footage
from rfjax.colour import lab
from rfjax.errors import UserError
from rfjax.score import WINDOW

UNITS = {
    "sharpness": "levels a pixel",
    "contrast": "levels",
    "saturation": "chroma",
    "colour drift": "ΔE",
    "flow": "% of the short side a second",
    "flicker": "levels",
}
SIDE = 256  # pixels of the short side at which frames are measured; smaller ones stay as they are
FLOW_SIDE, BLOCK, REACH = (
    128,
    16,
    6,
)  # of the picture in which motion is found, its blocks, and the farthest shift
LOOK = (128, 72)  # pixels of a frame on the contact sheet, in which videos of any shape lie whole
PAIRS = 4  # pairs of neighbouring frames a second in which motion is found


def files(folder: str) -> list[Path]:
    """The mp4 files of a folder, by name; UserError where there is none."""
    if not folder or not Path(folder).is_dir():
        raise UserError(
            f"There is no folder {folder or repr(folder)}; give --videos one that holds mp4 files."
        )
    found = sorted(Path(folder).glob("*.mp4"))
    if not found:
        raise UserError(f"There is no mp4 file in {folder}; give --videos a folder that holds some.")
    return found


def measure(path: Path) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """{measure: float [S]} of a video's whole seconds, units in `UNITS`, and their first frames, small: uint8 [h, w, 3] each.

    UserError where it is damaged or under 2 · 5 s.
    """
    size, fps = _shape(path)
    frames = max(2, round(fps))
    rows, lightness, colours, looks = [], [], [], []
    for second in footage.clips(path, size, fps, frames):
        row, light, colour = _second(second, fps)
        rows.append(row)
        lightness.append(light)
        colours.append(colour)
        looks.append(np.asarray(ImageOps.pad(Image.fromarray(second[0]), LOOK, color="white")))
    if len(rows) < 2 * WINDOW:
        raise UserError(f"{path} has {len(rows)} s; give videos of {2 * WINDOW} s or more.")
    found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    start = np.mean(colours[:WINDOW], 0)
    found["colour drift"] = np.linalg.norm(colours - start, axis=-1)
    found["flicker"] = _flicker(np.stack(lightness))
    return {name: found[name] for name in UNITS}, looks


def _shape(path):
    """((H, W) to measure at, frames a second)."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video in it.")
            stream = container.streams.video[0]
            height, width, rate = stream.height, stream.width, float(stream.average_rate or 16)
    except av.FFmpegError as error:
        raise UserError(f"Cannot read the video {path}: {error.strerror or 'it is damaged'}.") from error
    scale = min(1.0, SIDE / min(height, width))
    return (round(height * scale), round(width * scale)), rate


def _second(video, fps):
    """Frames uint8 [n, H, W, 3] → {measure: value}, mean lightness of every frame [n], mean colour in CIELAB [3]."""
    luma = video @ np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
    steps = [np.square(np.diff(video.astype(np.float32), axis=axis)).mean() for axis in (1, 2)]
    some = lab(video[:: max(1, len(video) // PAIRS)] / 255)
    first = np.linspace(0, len(luma) - 2, min(PAIRS, len(luma) - 1)).astype(int)
    stride = max(1, min(luma.shape[1:]) // FLOW_SIDE)
    small = _pooled(luma, stride)
    flow = np.mean([block_flow(small[frame], small[frame + 1]) for frame in first])
    row = {
        "sharpness": float(np.sqrt(sum(steps))),
        "contrast": float(luma.std((1, 2)).mean()),
        "saturation": float(np.hypot(some[..., 1], some[..., 2]).mean()),
        "flow": float(100 * flow * fps / min(small.shape[1:])),
    }
    return row, luma.mean((1, 2)), some.mean((0, 1, 2))


def _pooled(images, stride):
    """Means of squares of `stride` pixels: [n, H, W] → [n, H // stride, W // stride]."""
    count, height, width = images.shape
    height, width = height // stride, width // stride
    images = images[:, : height * stride, : width * stride]
    return images.reshape(count, height, stride, width, stride).mean((2, 4))


def block_flow(before, after):
    """Mean length in pixels by which the blocks of a picture [H, W] move to the next: the shift of least absolute difference.

    Of shifts that are as good the shortest is taken, so that a plain block rests. Longer shifts than REACH are not found.
    """
    height, width = (side // BLOCK * BLOCK for side in before.shape)
    padded = np.pad(after, REACH, mode="edge")
    steps = range(-REACH, REACH + 1)
    shifts = sorted(((y, x) for y in steps for x in steps), key=lambda shift: np.hypot(*shift))
    best = np.full((height // BLOCK, width // BLOCK), np.inf)
    length = np.zeros_like(best)
    for y, x in shifts:
        moved = padded[REACH + y : REACH + y + height, REACH + x : REACH + x + width]
        gap = np.abs(before[:height, :width] - moved).reshape(best.shape[0], BLOCK, best.shape[1], BLOCK)
        cost = gap.mean((1, 3))
        better = cost < best - 0.1  # of 255: a tenth of a level is noise
        best, length = np.where(better, cost, best), np.where(better, np.hypot(y, x), length)
    return float(length.mean())


def _flicker(lightness):
    """Mean lightness [S, n] → how much a frame's stands out from its neighbours', by second: steady fades have none."""
    line = lightness.reshape(-1)
    jumps = np.abs(line[1:-1] - (line[:-2] + line[2:]) / 2)
    return np.concatenate([jumps[:1], jumps, jumps[-1:]]).reshape(lightness.shape).mean(1)

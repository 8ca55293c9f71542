"""Pictures and videos of the user's own, brought to the clip's size and frame rate."""

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rfjax.errors import UserError

FITS = ("crop", "letterbox")


def fit(picture: Image.Image, size: tuple[int, int], how: str) -> np.ndarray:
    """A picture at size (H, W), uint8 [H, W, 3]: cropped at its longer sides, or whole between black bars ("letterbox")."""
    picture, (height, width) = _eight_bits(picture).convert("RGB"), size
    if how == "crop":
        return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
    return np.asarray(ImageOps.pad(picture, (width, height), Image.Resampling.BICUBIC, color="black"))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey values of 16 bits by their upper eight, since Pillow would make all above 255 white; ValueError for floats."""
    if picture.mode == "F":
        raise ValueError("a picture of floats has no scale")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))


def read_picture(path: str | os.PathLike, size: tuple[int, int], how: str) -> np.ndarray:
    """A picture file at size (H, W): uint8 [H, W, 3]; UserError if it cannot be read."""
    try:
        with Image.open(path) as picture:
            return fit(ImageOps.exif_transpose(picture), size, how)
    except Image.DecompressionBombError as error:
        raise UserError(f"The picture {path} has too many pixels; make it smaller.") from error
    # SyntaxError: of a PNG that is damaged further on. ValueError: of pixels that are no colours.
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no picture that can be read; give a PNG, JPEG or WebP file.") from error
    except OSError as error:
        raise UserError(f"Cannot read the picture {path}: {error.strerror or error}.") from error


def read_video(
    path: str | os.PathLike, size: tuple[int, int], fps: float, how: str, first: int, later: int
) -> tuple[Iterator[np.ndarray], int]:
    """The last first + n·later frames of a video at `fps`, n as large as can be, so that what follows joins its end.

    Args:
      size: (H, W) of the frames.
      how: "crop" or "letterbox".
      first, later: frames of the first block and of every later one.

    Returns:
      Frames uint8 [H, W, 3], read as they are taken, so that a long video never sits in memory; and how many there are.

    Raises:
      UserError: no video that can be read, or one shorter than `first` frames; at once, not at the first frame.
    """
    count = sum(1 for _ in _paced(path, fps))
    if count < first:
        raise UserError(
            f"{path} is too short to go on from: it has {count} frames at {fps:g} a second, and the first block takes {first}."
        )
    spare = (count - first) % later
    frames = (fit(upright(frame), size, how) for frame in islice(_paced(path, fps), spare, None))
    return frames, count - spare


def clips(path: str | os.PathLike, size: tuple[int, int], fps: float, frames: int) -> Iterator[np.ndarray]:
    """A video at `fps`, cropped to size (H, W), cut from its start into clips uint8 [frames, H, W, 3]; what is left is dropped.

    UserError for what cannot be read, when it is come to: whole clips before the damage are given.
    """
    shown = (fit(upright(frame), size, "crop") for frame in _paced(path, fps))
    while len(clip := list(islice(shown, frames))) == frames:
        yield np.stack(clip)


def upright(frame: av.VideoFrame) -> Image.Image:
    """A frame as players show it: phones film lying down, and say in the file by how much to turn."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _paced(path, fps: float) -> Iterator[av.VideoFrame]:
    """The frame that is shown at n / fps seconds, for n = 0, 1, … until the last frame's time is up."""
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video in it.")
            stream = container.streams.video[0]
            lasts = 1 / (stream.average_rate or Fraction(fps))
            yield from _resampled(container.decode(stream), Fraction(fps).limit_denominator(1001), lasts)
    except av.FFmpegError as error:
        raise UserError(f"Cannot read the video {path}: {error.strerror or 'it is damaged'}.") from error


def _resampled(frames: Iterable[av.VideoFrame], fps: Fraction, lasts: Fraction) -> Iterator[av.VideoFrame]:
    shown, start, place = None, None, 0
    for frame in frames:
        if frame.pts is None:
            raise UserError(
                "A frame of the video has no time; put it into an mp4 file first, as by ffmpeg -i VIDEO out.mp4."
            )
        time = frame.pts * frame.time_base
        start = time if start is None else start
        while shown is not None and place / fps < time - start:
            yield shown
            place += 1
        shown, end = frame, time - start + lasts
    while shown is not None and place / fps < end:
        yield shown
        place += 1

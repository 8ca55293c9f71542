"""Writers that take video frames as they come, in constant memory: mp4, gif, PNG files, a contact sheet.

A writer works on a partial file beside the target (`clip.partial.mp4`) and renames it when it is closed, so
what stood under the target's name is replaced only by a finished file. The mp4 is fragmented, one fragment a
second: the partial file of a run that was interrupted, or even killed, plays up to its last second.
"""

import contextlib
import errno
import io
import math
import os
import signal
import threading
from fractions import Fraction
from itertools import count
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rfjax import files
from rfjax.errors import UserError

READABLE = 256  # pixels: smaller frames are enlarged until their short side has as many
LONGEST = 16384  # pixels of a side, the most that H.264's encoder takes
SUPPORTED = "name it *.mp4, *.gif, *.png (a contact sheet), or folder/ with a slash at the end (PNG files)"


def partial_of(path: Path) -> Path:
    """Where a file or folder grows until it is finished: clip.mp4 → clip.partial.mp4."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class Writer:
    """Base of the writers. `with open_writer(...) as writer: writer.write(frames)`.

    Leaving the block normally finishes the file and moves it to `path`; leaving it by an exception keeps what
    was written under `partial` (removed when no frame was). OSError (a full disk) comes out of any call.
    """

    def __init__(self, path: Path, fps: Fraction, size: tuple[int, int]):
        self.path, self.fps, self.size = path, fps, size
        self.partial = partial_of(path)
        self.scale = 1
        self.frames = 0
        self._open()

    def write(self, frames: np.ndarray) -> None:
        """Appends frames: uint8 [n, H, W, 3] of the size given at opening."""
        if frames.dtype != np.uint8 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(f"need uint8 frames [n, {self.size}, 3], got {frames.dtype} {frames.shape}")
        for frame in frames:
            if not self.frames:
                self._clear()
            self._put(frame)
            self.frames += 1

    def close(self) -> None:
        """Finishes the frames [n, H, W, 3] that were written, and moves them from `partial` to `path`."""
        self._finish()
        os.replace(self.partial, self.path)

    def abandon(self) -> None:
        """Closes `partial` as it is, with the frames [n, H, W, 3] that were written; removes it where n is 0."""
        with contextlib.suppress(OSError):
            self._finish()
        if not self.frames and self._made:
            self._remove()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _open(self) -> None:
        """Creates the partial file, so that an unwritable place shows before any work. What an earlier run left there stays until
        the first frame comes."""
        self._made = not self.partial.exists()
        self._file = _File(
            self.partial, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)
        )
        files.lock(self._file.fileno(), str(self.partial), "give another name")

    def _clear(self) -> None:
        """Before the first frame."""
        if os.fstat(self._file.fileno()).st_size:
            self._file.truncate(0)

    def _put(self, frame: np.ndarray) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError

    def _remove(self) -> None:
        self.partial.unlink(missing_ok=True)


class _File(io.FileIO):
    """File that keeps its first error for `check`: raised in a container's callback, it vanishes."""

    error: OSError | None = None

    def write(self, data) -> int:
        left = memoryview(data)
        while left and not self.error:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self.error = error
        return len(data)

    def check(self) -> None:
        if self.error:
            raise self.error


@contextlib.contextmanager
def _interrupts_wait():
    """Ctrl-C takes effect when this is left: raised in a container's callback, it vanishes."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C is the main thread's
        yield
        return
    came = []
    usual = signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came and callable(usual):
        usual(*came[0])
    elif came:
        os.kill(os.getpid(), signal.SIGINT)


class _Encoder(Writer):
    """What mp4 and gif share: frames → [filters] → encoder → container, through PyAV."""

    def __init__(self, path, fps, size, scale: int):
        super().__init__(path, fps, size)
        self.scale = scale
        self._height, self._width = (side * scale for side in size)

    def _encode_into(self, codec: str, pixels: str, container: dict, options: dict) -> None:
        format_name = self.path.suffix[1:].lower()
        self._container = av.open(self._file, "w", format=format_name, container_options=container)
        self._stream = self._container.add_stream(codec, rate=self.fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = self._width, self._height, pixels

    def _put(self, frame):
        picture = av.VideoFrame.from_ndarray(enlarge(frame, self.scale), format="rgb24")
        picture.pts, picture.time_base = self.frames, 1 / self.fps
        self._mux(self._prepare(picture))

    def _mux(self, picture: av.VideoFrame | None) -> None:
        with _interrupts_wait():
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
        self._file.check()

    def _finish(self):
        try:
            if self.frames:
                self._mux(None)
        finally:
            with _interrupts_wait():
                self._container.close()
                self._file.close()
            self._file.check()

    def _prepare(self, picture: av.VideoFrame) -> av.VideoFrame:
        raise NotImplementedError


class Mp4Writer(_Encoder):
    """H.264, yuv420p, fragmented: each second is on disk, and plays, as soon as it is encoded."""

    def __init__(self, path, fps, size, scale: int, crf: int):
        super().__init__(path, fps, size, scale)
        second = max(1, round(fps))
        fragmented = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        # x264 at its usual preset takes longer for a frame than a small network does.
        low_latency = {"crf": str(crf), "g": str(second), "tune": "zerolatency", "preset": "veryfast"}
        self._encode_into("libx264", "yuv420p", fragmented, low_latency)
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = (
            1  # BT.709, said so that players need not guess
        )
        codec.color_range = 1  # limited

    def _prepare(self, picture):
        return picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


class GifWriter(_Encoder):
    """Endless loop, one palette a frame, so that frames leave as they come."""

    def __init__(self, path, fps, size, scale: int):
        super().__init__(path, fps, size, scale)
        self._encode_into("gif", "pal8", {"loop": "0"}, {})
        self._graph = graph = av.filter.Graph()
        self._source = graph.add_buffer(
            width=self._width, height=self._height, format="rgb24", time_base=1 / fps
        )
        split, sink = graph.add("split"), graph.add("buffersink")
        palette, use = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1")
        self._source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(use, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()

    def _prepare(self, picture):
        self._source.push(picture)
        return self._graph.pull()


class FramesWriter(Writer):
    """A folder of PNG files, `frame_000000.png` and on."""

    def __init__(self, path, fps, size, scale: int):
        super().__init__(path, fps, size)
        self.scale = scale

    def _open(self):
        for folder in (self.path, self.partial):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file, not a folder; give --out another name.")
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"{folder}/ already holds files; remove it or choose another folder.")
        self._made = not self.partial.exists()
        self.partial.mkdir(exist_ok=True)
        self._held = contextlib.ExitStack()
        try:
            self._held.enter_context(files.locked(self.partial, "choose another folder"))
        except OSError:  # too many open files; where another command has it, it is that one's
            if self._made:
                self._remove()
            raise

    def _clear(self):
        pass  # it is empty

    def _put(self, frame):
        Image.fromarray(enlarge(frame, self.scale)).save(self.partial / f"frame_{self.frames:06d}.png")

    def _finish(self):
        self._held.close()

    def _remove(self):
        self.partial.rmdir()


class SheetWriter(Writer):
    """Contact sheet: frames evenly spread over time, in rows, each with its time in seconds.

    The length need not be known: it keeps every s-th frame, and doubles s whenever it holds too many.
    """

    COLUMNS, MOST, CELL, LABEL, GAP = 8, 32, 128, 18, 4

    def _open(self):
        super()._open()
        self._kept: list[tuple[int, np.ndarray]] = []
        self._stride = 1

    def _put(self, frame):
        if self.frames % self._stride:
            return
        if len(self._kept) == self.MOST:
            self._kept = self._kept[::2]
            self._stride *= 2
        if self.frames % self._stride == 0:
            self._kept.append((self.frames, frame.copy()))

    def _finish(self):
        with self._file:
            if self._kept:
                self._sheet().save(self._file, "png")
        self._file.check()

    def _sheet(self) -> Image.Image:
        ratio = self.CELL / min(self.size)
        height, width = (round(side * ratio) for side in self.size)
        columns = min(self.COLUMNS, len(self._kept))
        rows = math.ceil(len(self._kept) / columns)
        step_x, step_y = width + self.GAP, height + self.LABEL + self.GAP
        sheet = Image.new("RGB", (columns * step_x + self.GAP, rows * step_y + self.GAP), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        digits = 1 if self._stride * 2 >= self.fps else 2
        for cell, (index, frame) in enumerate(self._kept):
            x, y = self.GAP + cell % columns * step_x, self.GAP + cell // columns * step_y
            filtering = Image.Resampling.NEAREST if ratio >= 1 else Image.Resampling.BOX
            sheet.paste(Image.fromarray(frame).resize((width, height), filtering), (x, y))
            draw.text((x, y + height + 1), f"{float(index / self.fps):.{digits}f} s", fill="black", font=font)
        return sheet


def enlarge(frame: np.ndarray, scale: int) -> np.ndarray:
    """[H, W, 3] → [scale·H, scale·W, 3], each pixel a square."""
    return np.ascontiguousarray(frame.repeat(scale, 0).repeat(scale, 1))


def readable_scale(size: tuple[int, int]) -> int:
    """Smallest whole factor that brings the short side to 256 pixels and both sides to even numbers."""
    return next(s for s in count(1) if s * min(size) >= READABLE and all(s * side % 2 == 0 for side in size))


def open_writer(
    path: str | os.PathLike, fps: float, size: tuple[int, int], *, scale: int | None = None, crf: int = 16
) -> Writer:
    """The writer that the name asks for: .mp4, .gif, .png (contact sheet), or a folder of PNG files.

    Args:
      path: where the finished file goes.
      fps: frames per second of playback.
      size: (H, W) of the frames that will come.
      scale: whole factor by which frames are enlarged; default so that the short side has 256 pixels.
      crf: H.264 quality, 0 (lossless) to 51 (worst); mp4 only.

    Raises:
      UserError: unsupported name, missing or unwritable folder, odd frame size for mp4, option out of range.
    """
    name, path = os.fspath(path), Path(path)
    kind = "/" if name.endswith("/") or os.path.isdir(path) else path.suffix.lower()
    if kind not in ("/", ".mp4", ".gif", ".png"):
        raise UserError(f"Cannot tell what to write from the name {name!r}; {SUPPORTED}.")
    if path.name in ("", ".."):
        raise UserError(f"{name!r} is no place of its own; {SUPPORTED}.")
    if not os.path.isdir(path.parent):
        raise UserError(f"The folder {path.parent}/ does not exist; create it, or write somewhere else.")
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"Frames per second must be a positive number, not {fps}.")
    if not 0 <= crf <= 51:
        raise UserError(f"crf must lie between 0 (lossless) and 51 (worst), not {crf}.")
    scale = readable_scale(size) if scale is None else scale
    if scale < 1:
        raise UserError(f"The scale must be a whole number from 1 up, not {scale}.")
    if max(size) > LONGEST:
        raise UserError(f"Frames of {max(size)} pixels are too large to be written; the most is {LONGEST}.")
    if scale * max(size) > LONGEST:
        raise UserError(
            f"The scale makes frames of {scale * max(size)} pixels; choose one of at most {LONGEST // max(size)}."
        )
    if kind == ".mp4" and any(scale * side % 2 for side in size):
        raise UserError(f"mp4 needs even sides, not {scale} × {size[0]}×{size[1]}; choose an even scale.")
    rate = Fraction(fps).limit_denominator(1001)
    try:
        if kind == ".mp4":
            return Mp4Writer(path, rate, size, scale, crf)
        if kind == ".gif":
            return GifWriter(path, rate, size, scale)
        return FramesWriter(path, rate, size, scale) if kind == "/" else SheetWriter(path, rate, size)
    except OSError as error:
        cure = "make fewer clips at a time" if error.errno == errno.EMFILE else "choose another place"
        raise UserError(f"Cannot write {name}: {error.strerror or error}; {cure}.") from error

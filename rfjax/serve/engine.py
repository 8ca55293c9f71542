"""The one thread that makes frames: it owns the batch, does what viewers ask between steps, and keeps each of them in hand.

A viewer shows `fps` frames a second from the moment when it has some, so the time at which it will have shown all of them
follows from what was made for it. The engine steps the streams that have less than `AHEAD` in hand, by this clock and
not by what viewers say: a slow viewer loses frames, and neither slows the others nor makes anything grow. When the
machine is fast, steps are few and small; when it is not, all streams are due at once and share each step.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

import av
import numpy as np

from rfjax.errors import UserError
from rfjax.serve import protocol
from rfjax.serve.metrics import Metrics
from rfjax.serve.protocol import Frame, Refusal, Reply, Request

AHEAD = 1.0  # seconds that a viewer should have in hand
STUCK = 60.0  # seconds without a sign of life after which the engine counts as stuck


class Viewer(Protocol):
    """Who watches; `deliver` is called from the engine's thread and must not wait."""

    dropped: int

    def deliver(self, item: Reply | Frame) -> None: ...


@dataclasses.dataclass
class Stream:
    """One viewer's place in the batch."""

    slot: int
    asked: float  # when it was started
    empty: float  # when its viewer will have shown all that was made for it
    prompt: int = 0  # number of the prompt that is in force
    frames: int = 0
    held: float | None = None  # while it pauses, the seconds that its viewer keeps in hand


class Jpeg:
    """Frames → JPEG, colours at full resolution and the finest quantisation that the encoder has."""

    def __init__(self, height: int, width: int, fps: float):
        self._codec = av.CodecContext.create("mjpeg", "w")
        self._codec.height, self._codec.width, self._codec.pix_fmt = height, width, "yuvj444p"
        self._codec.time_base, self._codec.thread_count = 1 / Fraction(fps).limit_denominator(1001), 1
        self._codec.qmin = self._codec.qmax = 1

    def encode(self, frame: np.ndarray) -> bytes:
        """uint8 [H, W, 3] → the file's bytes."""
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuvj444p", dst_colorspace="ITU601", dst_color_range="JPEG")
        (packet,) = self._codec.encode(picture)  # each picture by itself, none held back
        return bytes(packet)


def overtaken(asked: list[tuple[Viewer, Request | None]]) -> set[int]:
    """Indices of starts and prompts of which nothing would be seen, because of what the same viewer asks after them."""
    found, prompted, anew = (
        set(),
        set(),
        set(),
    )  # indices; viewers who ask later for another prompt, for another stream or none
    for index, (viewer, request) in reversed(list(enumerate(asked))):
        match request:
            case protocol.Prompt():
                if viewer in prompted | anew:
                    found.add(index)
                prompted.add(viewer)
            case protocol.Start() | protocol.Stop() | None:
                if viewer in anew and isinstance(request, protocol.Start):
                    found.add(index)
                anew.add(viewer)
    return found


class Engine:
    """`tell` may be called from any thread; all else of the batch happens in the engine's own."""

    def __init__(self, live, metrics: Metrics, failed: Callable[[], None] = lambda: None):
        """Args:
        live: a `rfjax.live.Live`.
        failed: called in the engine's thread when it ends by an error, which `error` then holds.
        """
        self.live, self.metrics, self.failed = live, metrics, failed
        self.error: BaseException | None = None
        self.ready = threading.Event()  # warm, or failed
        self._look = live.sampler.video
        self._jpeg = Jpeg(self._look.height, self._look.width, self._look.fps)
        self._streams: dict[Viewer, Stream] = {}
        self._asked: queue.SimpleQueue[tuple[Viewer, Request | None] | None] = queue.SimpleQueue()
        self._step_seconds = 0.0
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------------------- from any thread

    def start(self) -> None:
        """Compiles all programs and begins; raises what went wrong while compiling."""
        self._thread.start()
        while not self.ready.wait(1):  # so that Ctrl-C is heard meanwhile
            pass
        if self.error:
            raise self.error

    def stop(self) -> None:
        """Ends the thread after the step that it is in."""
        self._asked.put(None)
        self._thread.join(STUCK)

    def tell(self, viewer: Viewer, request: Request | None) -> None:
        """Hands in what a viewer asks; None when it has gone."""
        self._asked.put((viewer, request))

    @property
    def taken(self) -> int:
        """Places that are taken."""
        return len(self._streams)

    @property
    def healthy(self) -> bool:
        """Whether the thread lives and is not stuck in a step."""
        return self._thread.is_alive() and time.monotonic() - self._beat < STUCK

    # ---------------------------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        try:
            self.live.warm()
            self.ready.set()
            while self._obey():
                self._step()
        except BaseException as error:  # whatever it is, the server must not look alive without its engine
            self.error = error
            self.ready.set()
            self.failed()

    def _running(self) -> list[tuple[Viewer, Stream]]:
        return [(viewer, stream) for viewer, stream in self._streams.items() if stream.held is None]

    def _due(self, now: float) -> list[Viewer]:
        return [viewer for viewer, stream in self._running() if stream.empty - now < AHEAD]

    def _wait(self, now: float) -> float:
        """Seconds until a stream is due; 1 at most."""
        waits = (stream.empty - AHEAD - now for _, stream in self._running())
        return min(1.0, max(0.0, min(waits, default=1.0)))

    def _obey(self) -> bool:
        """Does what was asked until now, waiting for it while nothing else is to do; False when it shall end.

        A viewer who asks faster than prompts are read keeps nobody waiting for more than one of them: the newest counts.
        """
        self._beat = now = time.monotonic()
        asked = self._heard(self._wait(now))
        told = [item for item in asked if item is not None]
        stale = overtaken(told)
        for index, (viewer, request) in enumerate(told):
            if index in stale:
                self._refuse(viewer, Refusal("late", "A newer request came before this one was done."))
            else:
                self._beat = time.monotonic()  # one prompt may take UMT5 seconds
                self._do(viewer, request)
        return None not in asked

    def _heard(self, wait: float) -> list[tuple[Viewer, Request | None] | None]:
        """All that was handed in until now; where that is nothing, the next within `wait` seconds."""
        heard = []
        with contextlib.suppress(queue.Empty):
            heard.append(self._asked.get(timeout=wait) if wait else self._asked.get_nowait())
            while True:
                heard.append(self._asked.get_nowait())
        return heard

    def _do(self, viewer: Viewer, request: Request | None) -> None:
        try:
            match request:
                case None:
                    self._leave(viewer)
                case protocol.Start():
                    self._start(viewer, request)
                case protocol.Prompt():
                    stream = self._stream(viewer)
                    self.live.change(stream.slot, request.prompt)
                    stream.prompt += 1
                    viewer.deliver(protocol.Prompted(request.prompt, stream.prompt))
                case protocol.Pause():
                    self._pause(self._stream(viewer), request.paused)
                    viewer.deliver(protocol.Paused(request.paused))
                case protocol.Stop():
                    self._leave(viewer)
                    viewer.deliver(protocol.Stopped())
                case protocol.Stats():
                    viewer.deliver(self._figures(viewer))
        except UserError as error:
            self._refuse(viewer, error)

    def _refuse(self, viewer: Viewer, error: UserError) -> None:
        code = error.code if isinstance(error, Refusal) else "prompt"  # the batch refuses prompts only
        self.metrics.refused.labels(code).inc()
        viewer.deliver(protocol.Refused(code, str(error)))

    def _stream(self, viewer: Viewer) -> Stream:
        if viewer not in self._streams:
            raise Refusal("state", "No stream runs; start one first.")
        return self._streams[viewer]

    def _start(self, viewer: Viewer, request: protocol.Start) -> None:
        """A place in the batch; a viewer that has one keeps it."""
        now = time.monotonic()
        if viewer in self._streams:
            slot = self._streams[viewer].slot
            self.live.change(
                slot, request.prompt, "keep"
            )  # refuses a bad prompt before anything else is changed
            self.live.restart(slot, request.seed)
        elif len(self._streams) < self.live.limit:
            slot = self.live.join(request.prompt, request.seed)
        else:
            places = f"All {self.live.limit} places are" if self.live.limit > 1 else "The one place is"
            raise Refusal("full", f"{places} taken; try again in a while.")
        self._streams[viewer] = Stream(slot, asked=now, empty=now)
        viewer.deliver(protocol.Started(request.prompt, request.seed))

    def _pause(self, stream: Stream, paused: bool) -> None:
        now = time.monotonic()
        if paused and stream.held is None:
            stream.held = max(0.0, stream.empty - now)
        elif not paused and stream.held is not None:
            stream.empty, stream.held = now + stream.held, None

    def _leave(self, viewer: Viewer) -> None:
        stream = self._streams.pop(viewer, None)
        if stream:
            self.live.leave(stream.slot)

    def _figures(self, viewer: Viewer) -> protocol.Figures:
        stream = self._streams.get(viewer)
        places, taken, frames, ahead = self.live.limit, len(self._streams), 0, 0.0
        if stream:
            now = time.monotonic()
            frames = stream.frames
            ahead = max(0.0, stream.empty - now) if stream.held is None else stream.held
        return protocol.Figures(places, taken, frames, viewer.dropped, ahead, self._step_seconds)

    def _step(self) -> None:
        """One step of the streams that are due, whose frames go to their viewers."""
        started = time.monotonic()
        viewers = {self._streams[viewer].slot: viewer for viewer in self._due(started)}
        if not viewers:
            return
        blocks = self.live.step(tuple(viewers))
        self._step_seconds = time.monotonic() - started
        self.metrics.steps.observe(self._step_seconds)
        for slot, frames in blocks.items():
            self._hand_out(viewers[slot], frames)

    def _hand_out(self, viewer: Viewer, frames: np.ndarray) -> None:
        """Frames uint8 [m, H, W, 3] → the viewer."""
        stream = self._streams[viewer]
        for frame in frames:
            viewer.deliver(Frame(stream.frames, stream.prompt, self._jpeg.encode(frame)))
            stream.frames += 1
        now = time.monotonic()
        if stream.frames == len(frames):
            self.metrics.first_frames.observe(now - stream.asked)
        self.metrics.frames.inc(len(frames))
        stream.empty = max(stream.empty, now) + len(frames) / self._look.fps

"""What waits for one viewer: replies all of them, frames only the newest."""

import asyncio
import contextlib
import time
from collections import deque

from rfjax.serve import protocol
from rfjax.serve.metrics import Metrics
from rfjax.serve.protocol import Frame, Reply

SECONDS = 2.0  # of frames that wait for a slow viewer
REPLIES = 64  # that wait for a viewer which does not read; one more ends its socket


class Viewer:
    """A socket's outbox. The engine's thread delivers; all else happens on the event loop."""

    def __init__(self, fps: float, metrics: Metrics):
        self._loop, self._metrics = asyncio.get_running_loop(), metrics
        self._replies: deque[Reply] = deque()
        self._frames: deque[Frame] = deque()
        self._most = max(1, round(SECONDS * fps))
        self._filled = asyncio.Event()
        self.closing: asyncio.Future[tuple[int, str]] = self._loop.create_future()
        self.rate = protocol.Rate()
        self.dropped = 0  # frames of the present stream

    def deliver(self, item: Reply | Frame) -> None:
        """Puts something in from any thread, without waiting."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self.put, item)

    def put(self, item: Reply | Frame) -> None:
        """The same on the event loop."""
        if isinstance(item, Frame):
            self._frames.append(item)
            if len(self._frames) > self._most:
                self._frames.popleft()
                self.dropped += 1
                self._metrics.dropped.inc()
        else:
            if isinstance(item, protocol.Started | protocol.Stopped):  # frames of the stream before
                self._frames.clear()
                self.dropped = 0
            self._replies.append(item)
            if len(self._replies) > REPLIES:
                self.close(protocol.FORBIDDEN, "Too many answers wait to be read.")
        self._filled.set()

    async def next(self) -> str | bytes:
        """The next message to send; replies first."""
        while not (self._replies or self._frames):
            self._filled.clear()
            await self._filled.wait()
        if self._replies:
            return protocol.text(self._replies.popleft())
        return protocol.binary(self._frames.popleft())

    def close(self, code: int, reason: str) -> None:
        """Has the socket closed, now, with the first reason that is given."""
        if not self.closing.done():
            self.closing.set_result((code, reason))

    def may_ask(self) -> bool:
        """Whether a request that comes now is within the viewer's rate."""
        return self.rate.allows(time.monotonic())

"""The web application: the page, a WebSocket a viewer, health and metrics."""

import asyncio
import contextlib
import hmac
from importlib import resources

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from rfjax.serve import protocol
from rfjax.serve.engine import Engine
from rfjax.serve.viewer import Viewer

VIEWERS = 256  # sockets at most, playing or not
SEND = 20.0  # seconds that a message may take to leave before its viewer counts as gone
FAREWELL = 1.0  # seconds for the same of a socket's last message
PAGE = {  # all that is served from files, read once
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/link.js": ("link.js", "text/javascript"),
    "/player.js": ("player.js", "text/javascript"),
    "/sentence.js": ("sentence.js", "text/javascript"),
    "/strip.js": ("strip.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Site:
    """Sockets between viewers and the engine."""

    def __init__(
        self, engine: Engine, hello: protocol.Hello, origins: frozenset[str], token: str | None = None
    ):
        """Args:
        hello: what every viewer is told first; its `idle_seconds` is how long a viewer may be silent.
        origins: pages that may open a socket, like "http://127.0.0.1:8000".
        token: what a viewer, and who reads the metrics, must show; None: nothing.
        """
        self.engine, self.hello, self.origins, self.token = engine, hello, origins, token
        self.viewers: set[Viewer] = set()
        self.ending: tuple[int, str] | None = None
        self.app = Starlette(routes=self._routes())

    async def end(self, code: int, reason: str) -> None:
        """Closes all sockets with this reason, and those that come later."""
        self.ending = (code, reason)
        for viewer in self.viewers:
            viewer.close(code, reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * FAREWELL):
                while self.viewers:
                    await asyncio.sleep(0.02)

    # ------------------------------------------------------------------------------------------------ pages

    def _routes(self) -> list[Route | WebSocketRoute]:
        folder = resources.files("rfjax.serve") / "static"
        page = [Route(path, _file((folder / name).read_bytes(), kind)) for path, (name, kind) in PAGE.items()]
        told = [Route("/health", self._health), Route("/metrics", self._metrics)]
        return [*page, *told, WebSocketRoute("/stream", self._stream)]

    async def _health(self, request: Request) -> Response:
        if self.ending or not self.engine.healthy:
            return JSONResponse({"status": "ending" if self.ending else "stuck"}, 503, HEADERS)
        return JSONResponse({"status": "ok"}, headers=HEADERS)

    async def _metrics(self, request: Request) -> Response:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not self._knows([token] if scheme.lower() == "bearer" else []):
            return PlainTextResponse("The metrics need the token as a bearer.\n", 401, HEADERS)
        told = self.engine.metrics
        told.places.set(self.engine.live.limit)
        told.streams.set(self.engine.taken)
        told.viewers.set(len(self.viewers))
        try:
            encode, kind = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # a version that is no number
            encode, kind = choose_encoder("")
        return Response(encode(told.registry), headers=HEADERS | {"Content-Type": kind})

    def _knows(self, shown: list[str]) -> bool:
        """Whether the token is among what is shown, or none is needed."""
        if self.token is None:
            return True
        return any(hmac.compare_digest(word.encode(), self.token.encode()) for word in shown)

    # ---------------------------------------------------------------------------------------------- sockets

    async def _stream(self, socket: WebSocket) -> None:
        """One viewer's socket, from its handshake to its end."""
        if socket.headers.get("origin") not in self.origins:
            self.engine.metrics.refused.labels("origin").inc()
            page = "This socket is for this server's own page; others are named by --origin.\n"
            return await socket.send_denial_response(PlainTextResponse(page, 403))
        offered = socket.scope["subprotocols"]
        await socket.accept(protocol.NAME if protocol.NAME in offered else None)
        if refused := self._unwelcome(offered):
            return await _farewell(socket, *refused)
        viewer = Viewer(self.hello.fps, self.engine.metrics)
        self.viewers.add(viewer)
        try:
            await self._converse(socket, viewer)
        finally:
            self.viewers.discard(viewer)
            self.engine.tell(viewer, None)

    def _unwelcome(self, offered: list[str]) -> tuple[int, str] | None:
        """Code and reason with which a new socket is closed; None where it is welcome."""
        if self.ending:
            return self.ending
        if not self._knows(offered):
            self.engine.metrics.refused.labels("token").inc()
            return protocol.FORBIDDEN, "This server needs its token: open the page with #token=… at its end."
        if len(self.viewers) >= VIEWERS:
            self.engine.metrics.refused.labels("viewers").inc()
            return protocol.LATER, f"{VIEWERS} viewers are connected already; try again later."
        return None

    async def _converse(self, socket: WebSocket, viewer: Viewer) -> None:
        """Reads and writes until the viewer goes, or has to go."""
        viewer.put(self.hello)
        tasks = [asyncio.create_task(work(socket, viewer)) for work in (self._read, self._write)]
        try:
            await asyncio.wait([*tasks, viewer.closing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):  # no cancellation: the server's own mistake, for its log
                raise error
        if viewer.closing.done():
            code, reason = viewer.closing.result()
            self.engine.metrics.closed.labels(code).inc()
            await _farewell(socket, code, reason)

    async def _read(self, socket: WebSocket, viewer: Viewer) -> None:
        """Hands requests to the engine; ends when the viewer goes, is silent for too long, or asks too much."""
        while True:
            try:
                async with asyncio.timeout(self.hello.idle_seconds):
                    message = await socket.receive()
            except TimeoutError:
                return viewer.close(protocol.IDLE, "Nothing came from this viewer for long.")
            if message["type"] == "websocket.disconnect":
                return
            if not viewer.may_ask():
                return viewer.close(protocol.FORBIDDEN, "Too many requests at once.")
            try:
                request = protocol.parse(message.get("text") or message.get("bytes") or "")
            except protocol.Refusal as refusal:
                self.engine.metrics.refused.labels(refusal.code).inc()
                viewer.put(protocol.Refused(refusal.code, str(refusal)))
                continue
            self.engine.metrics.requests.labels(type(request).__name__.lower()).inc()
            self.engine.tell(viewer, request)

    async def _write(self, socket: WebSocket, viewer: Viewer) -> None:
        """Sends what waits, as fast as the viewer takes it."""
        while True:
            message = await viewer.next()
            try:
                async with asyncio.timeout(SEND):
                    if isinstance(message, str):
                        await socket.send_text(message)
                    else:
                        await socket.send_bytes(message)
            except TimeoutError:
                return viewer.close(protocol.LATER, "The connection is too slow.")
            except (WebSocketDisconnect, RuntimeError):  # closed meanwhile; the second by who finds out first
                return


def _file(content: bytes, kind: str):
    async def serve(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return serve


async def _farewell(socket: WebSocket, code: int, reason: str) -> None:
    """Closes a socket with a reason, if it still takes one."""
    with contextlib.suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
        async with asyncio.timeout(FAREWELL):
            await socket.close(code, reason)

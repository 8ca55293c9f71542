"""From a batch to a server that listens, and to its end."""

import logging
import signal
import socket

import uvicorn

from rfjax.errors import UserError
from rfjax.serve import app, protocol, wire
from rfjax.serve.engine import Engine
from rfjax.serve.metrics import Metrics

GONE = 30  # seconds without any progress after which the system ends a connection
UNSENT = 32_768  # bytes that wait in the system for a slow viewer; more wait, and give way, in its outbox
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Listener(uvicorn.Server):
    """The web server of one engine, which lives as long. Before it ends, each viewer is told why."""

    def __init__(
        self,
        live,
        hello: protocol.Hello,
        listener: socket.socket,
        token: str | None = None,
        more_origins: tuple[str, ...] = (),
    ):
        """Args:
        live: a `rfjax.live.Live`.
        listener: from `listen`; it is closed in the end.
        token: what viewers must show; None: nothing.
        more_origins: of pages that may connect besides this server's own, like "https://example.org".
        """
        self.listener, (host, port) = listener, listener.getsockname()[:2]
        self.engine = Engine(live, Metrics(), self._stop_soon)
        self.site = app.Site(self.engine, hello, origins(host, port, more_origins), token)
        limits = dict(ws_max_size=protocol.MESSAGE, ws_per_message_deflate=False, timeout_graceful_shutdown=5)
        quiet = dict(log_config=None, access_log=False, server_header=False, proxy_headers=False)
        super().__init__(
            uvicorn.Config(
                self.site.app, http=wire.Requests, ws=wire.Socket, lifespan="off", **limits, **quiet
            )
        )

    def run(self, heard: tuple[int, ...] = ()) -> None:
        """Compiles, listens until told to stop, and raises what ended the engine if that was the cause.

        The signals that are `heard` stop it without being errors, once it listens; they need the main thread.
        """
        with self.listener:
            print("Compiling; only the first time takes minutes.", flush=True)
            self.engine.start()
            for number in heard:  # uvicorn hears them, and raises them again when it is done
                signal.signal(number, lambda *_: None)
            print(
                f"Listening on {self.address}, places: {self.engine.live.limit}; Ctrl-C ends it.", flush=True
            )
            super().run(sockets=[self.listener])
            for number in heard:  # a second one ends it at once, though the engine be in a long step
                signal.signal(number, signal.SIG_DFL)
            self.engine.stop()
        if self.engine.error:
            raise self.engine.error

    @property
    def address(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"http://{bracketed(host)}:{port}"

    def _stop_soon(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets=None) -> None:
        failed = self.engine.error is not None
        reason = "The server has failed." if failed else "The server is shutting down."
        await self.site.end(protocol.BROKEN if failed else protocol.GOING, reason)
        await super().shutdown(sockets)


def bracketed(host: str) -> str:
    """An address as URLs have it."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. UserError where that cannot be."""
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, UnicodeError) as error:  # the latter of a name that is none, like a..b
        why = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot listen on {host}:{port}: {why}; give another --host or --port.") from error
    for option, value in (("TCP_USER_TIMEOUT", 1000 * GONE), ("TCP_NOTSENT_LOWAT", UNSENT)):
        if hasattr(socket, option):  # Linux has both; connections inherit them
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return listener


def origins(host: str, port: int, more: tuple[str, ...]) -> frozenset[str]:
    """Pages that may open a socket: this server's own under its local names, and those that are named."""
    own = (f"http://{name}:{port}" for name in (*LOCAL, bracketed(host)))
    return frozenset(map(as_sent, (*own, *more)))


def as_sent(origin: str) -> str:
    """An origin as browsers send it: in small letters, and without its scheme's own port."""
    origin = origin.lower()
    return origin.removesuffix(":80" if origin.startswith("http://") else ":443")


def serve(*of_listener) -> None:
    """Runs a `Listener` until SIGTERM or Ctrl-C."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    Listener(*of_listener).run((signal.SIGTERM, signal.SIGINT))

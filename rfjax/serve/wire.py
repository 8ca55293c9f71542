"""Connections before they say anything whole: how many there may be, how long they may take, and how much may come over them."""

import asyncio
import time

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from rfjax.serve import protocol

CONNECTIONS = 512  # at a time, of all kinds; one more is dropped
PATIENCE = 10.0  # seconds in which a connection must have made its first, or another, whole request


class Requests(H11Protocol):
    """HTTP; a connection that asks for nothing, or never comes to the end of it, is dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._seen, self._timer = None, self.loop.call_later(PATIENCE, self._look)
        if len(self.connections) > CONNECTIONS:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(error)

    def _look(self) -> None:
        if self.transport.get_protocol() is not self:  # it has become a WebSocket
            return
        if self.cycle is self._seen:  # no request since the last look
            return self.transport.abort()
        self._seen, self._timer = self.cycle, self.loop.call_later(PATIENCE, self._look)


class Socket(WebSocketsSansIOProtocol):
    """A viewer's WebSocket. All its bytes are counted, those of pings and of unfinished messages too, which no request shows."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._rate = protocol.Rate(protocol.BYTES_PER_SECOND, protocol.BYTES)

    def data_received(self, data: bytes) -> None:
        if self._rate.allows(time.monotonic(), len(data)):
            return super().data_received(data)
        super().data_received(data[: protocol.MESSAGE])  # whose head may say that the message is too long
        if self.transport.is_closing():
            return
        if self.close_sent or not self.handshake_complete:
            return self.transport.abort()
        self.conn.fail(protocol.FORBIDDEN, "Too many bytes at once.")
        self.handle_parser_exception()  # sends that, tells the application, and closes

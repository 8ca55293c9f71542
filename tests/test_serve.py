"""Viewers of the live server, over real sockets with a batch that needs no network: what they get, and what is refused."""

import contextlib
import socket
import time

import fake_live
import numpy as np
import pytest
from clients import RED, STAR, Client, counted, eventually, serving
from fake_live import pixels
from websockets.exceptions import ConnectionClosed

from rfjax import detect
from rfjax.serve import engine, protocol


@pytest.fixture(scope="module")
def shared():
    """One server for the tests that leave it as it was."""
    with serving(limit=2) as server:
        yield server


@pytest.fixture
def connect(shared):
    """A function that connects viewers, who leave in the end."""
    with contextlib.ExitStack() as stack:

        def connect(port=shared.port, **options):
            client = Client(port, **options)
            stack.callback(client.socket.close)
            return client

        yield connect
    eventually(lambda: shared.server.engine.taken == 0 and not shared.server.site.viewers)


def test_a_stream_shows_its_prompt_then_the_next(connect):
    client = connect()
    hello = client.reply("hello")
    assert (hello["width"], hello["height"], hello["fps"], hello["places"]) == (64, 64, 16, 2)
    assert hello["examples"][0] == RED and "star" in hello["words"]["shape"]
    assert client.start(RED, 3) == {"prompt": RED, "seed": 3}
    client.watch(lambda frames: len(frames) > 16)
    client.ask("prompt", prompt=STAR)
    assert client.reply("prompted") == {"prompt": STAR, "number": 1}
    frames = client.watch(lambda frames: sum(frame.prompt == 1 for frame in frames) >= 12)
    assert [frame.number for frame in frames] == list(range(len(frames)))
    before, after = (np.stack([pixels(frame) for frame in frames if frame.prompt == p]) for p in (0, 1))
    assert (detect.detect(before).objects[0].shape, detect.detect(before).background) == ("circle", "blue")
    assert (detect.detect(after).objects[0].shape, detect.detect(after).background) == ("star", "purple")


def test_start_anew_stop_and_the_order_of_requests(connect):
    client = connect()
    client.reply("hello")
    for kind, fields in (("prompt", {"prompt": RED}), ("pause", {"paused": True})):
        client.ask(kind, **fields)
        assert client.reply("refused")["code"] == "state"
    client.start()
    client.watch(lambda frames: len(frames) > 9)
    client.start(STAR, 5)
    client.frames.clear()  # what came before the answer is of the stream before
    assert [frame.number for frame in client.watch(lambda frames: len(frames) > 9)] == list(range(10))
    client.ask("stop")
    client.reply("stopped")
    client.ask("stats")
    figures = client.reply("figures")
    assert (figures["taken"], figures["frames"], figures["places"]) == (0, 0, 2)


def test_pause_holds_and_resume_goes_on(connect, shared):
    client = connect()
    client.reply("hello")
    client.start()
    client.watch(lambda frames: len(frames) >= 16)
    client.ask("pause", paused=True)
    assert client.reply("paused") == {"paused": True}
    shared.live.stepped.clear()
    client.ask("stats")
    held = client.reply("figures")
    assert held["ahead_seconds"] > 0
    client.ask("stats")
    assert client.reply("figures")["ahead_seconds"] == held["ahead_seconds"]
    time.sleep(1.5 * engine.AHEAD)  # in which a stream that is not held would be due again
    assert not shared.live.stepped
    client.ask("pause", paused=False)
    assert client.reply("paused") == {"paused": False}
    frames = client.watch(lambda frames: frames[-1].number >= held["frames"] + 12)
    assert [frame.number for frame in frames] == list(range(len(frames)))


def test_bad_requests_leave_the_stream_as_it_was(connect):
    client = connect()
    client.reply("hello")
    client.start()
    for message in ("nonsense", b"\0\1", '{"type": "start"}'):
        client.socket.send(message)
        assert client.reply("refused")["code"] == "malformed"
    for prompt, says in (
        ("", "empty"),
        ("a red dragon", "Unknown in the prompt: dragon"),
        ("a" * 2001, "2001"),
    ):
        client.ask("prompt", prompt=prompt)
        refused = client.reply("refused")
        assert refused["code"] == "prompt" and says in refused["message"]
    client.ask("start", prompt="../../etc/passwd", seed=0)
    assert "Unknown" in client.reply("refused")["message"]
    count = len(client.frames)
    frames = client.watch(lambda frames: len(frames) > count + 30)
    assert {frame.prompt for frame in frames} == {0}
    assert [frame.number for frame in frames] == list(range(len(frames)))


def test_a_full_server_says_so_and_a_place_that_is_left_is_free(connect, shared):
    first, second, third = (connect() for _ in range(3))
    for client in (first, second, third):
        client.reply("hello")
    first.start()
    second.start()
    third.ask("start", prompt=RED, seed=0)
    refused = third.reply("refused")
    assert refused["code"] == "full" and "All 2 places are taken" in refused["message"]
    first.start(STAR)  # who has a place may start anew
    second.socket.close()
    eventually(lambda: shared.server.engine.taken == 1)
    third.start(STAR)
    assert len(third.watch(lambda frames: len(frames) >= 20)) == 20


def test_a_huge_message_ends_its_own_socket_alone(connect):
    large, huge, other = connect(), connect(), connect()
    for one in (large, other):
        one.reply("hello")
        one.start()
    large.socket.send("x" * (protocol.MESSAGE + 1))
    assert large.closed()[0] == 1009
    with pytest.raises(
        ConnectionClosed
    ):  # while it is sent, or after; the code may be lost with the rest of it
        huge.socket.send("x" * 10_000_000)
        huge.closed()
        huge.next()
    frames = other.watch(lambda frames: len(frames) > 40)
    assert [frame.number for frame in frames] == list(range(len(frames)))


def masked(opcode, payload=b"", fin=True):
    """A client's frame on the wire, RFC 6455 section 5.2, with a mask of zeros."""
    return bytes([opcode | 0x80 * fin, 0x80 | len(payload), 0, 0, 0, 0]) + payload


@pytest.mark.parametrize("frame", [masked(9, b"ping"), masked(0, fin=False)], ids=["pings", "pieces"])
def test_a_flood_that_is_no_request_ends_its_own_socket_alone(connect, frame):
    """Pings whose answers nobody reads, and a message of empty pieces that never ends."""
    flood, other = connect(), connect()
    for one in (flood, other):
        one.reply("hello")
        one.start()
    flood.socket.socket.sendall(masked(1, b" ", fin=False))
    with contextlib.suppress(OSError):  # the server has hung up
        for _ in range(1000):
            flood.socket.socket.sendall(frame * 100)
    with pytest.raises(ConnectionClosed) as end:  # the reason may be lost with what was not read
        while True:
            flood.next()
    assert end.value.rcvd is None or end.value.rcvd.code == 1008
    frames = other.watch(lambda frames: len(frames) > 40)
    assert [frame.number for frame in frames] == list(range(len(frames)))


def test_too_many_requests_end_the_socket(connect):
    client = connect()
    with contextlib.suppress(ConnectionClosed):
        for _ in range(200):
            client.ask("stats")
    assert client.closed() == (1008, "Too many requests at once.")


def test_a_silent_viewer_is_closed_and_one_that_asks_is_not(connect):
    with serving(idle=3.0) as server:
        silent, other = connect(server.port), connect(server.port)
        for client in (silent, other):
            client.reply("hello")
        silent.start()

        def asked():
            other.ask("stats")
            return other.reply("figures")["taken"] == 0

        eventually(asked, every=0.2)
        assert silent.closed()[0] == protocol.IDLE
        asked()


class Noise(fake_live.FakeLive):
    """Frames that take much to send, and many of them a second."""

    def __init__(self):
        super().__init__(2)
        self.sampler.video.fps = 400
        noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
        self.sampler.video.height = self.sampler.video.width = 256
        self.noise = noise.repeat(4, 1).repeat(4, 2)

    def _block(self, stream):
        return self.noise


def test_a_slow_reader_loses_frames_while_others_go_on(connect):
    with serving(Noise()) as server:
        slow = Client(server.port)
        slow.reply("hello")
        slow.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.ask("start", prompt=RED, seed=0)
        other = connect(server.port)
        other.reply("hello")
        other.start()
        other.watch(lambda frames: len(frames) > 1500 or counted(server.port, "frames_dropped_total") > 0)
        assert counted(server.port, "frames_dropped_total") > 0
        last = other.frames[-1].number
        other.watch(lambda frames: frames[-1].number >= last + 24)

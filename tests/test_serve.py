"""The live server, over real sockets with a batch that needs no network: what it answers, refuses and survives."""

import contextlib
import http.client
import io
import json
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rfjax import detect, shapes
from rfjax.errors import UserError
from rfjax.serve import __main__ as command
from rfjax.serve import engine, metrics, protocol

pytest.importorskip("starlette", reason="the server's extra is not installed: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="the server's extra is not installed: pip install -e '.[serve]'")
websockets = pytest.importorskip("websockets.sync.client", reason="needs websockets")

import fake_live  # noqa: E402
import served  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from rfjax.serve import app, run, viewer  # noqa: E402

ROOT = Path(__file__).parents[1]
RED, STAR = shapes.PROMPTS[:2]
TOKEN = "a-token_of-22-letters"
DEADLINE = 60.0  # seconds after which something that does not come counts as missing


class Client:
    """A viewer's end of the socket."""

    def __init__(self, port, token=None, **options):
        offered = [protocol.NAME, *([token] if token else [])]
        options = (
            dict(origin=f"http://127.0.0.1:{port}", subprotocols=offered, proxy=None, max_queue=None)
            | options
        )
        self.socket = websockets.connect(f"ws://127.0.0.1:{port}/stream", **options).__enter__()
        self.frames = []

    def ask(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self):
        """The next reply, or None for a frame, which is kept."""
        message = self.socket.recv(timeout=DEADLINE)
        if isinstance(message, str):
            return json.loads(message)
        self.frames.append(protocol.frame(message))
        return None

    def reply(self, kind):
        """The next reply, which must be of this kind."""
        while (told := self.next()) is None:
            pass
        assert told.pop("type") == kind, told
        return told

    def watch(self, until):
        """Receives until something holds of the frames."""
        while not until(self.frames):
            assert self.next() is None
        return self.frames

    def start(self, prompt=RED, seed=0):
        self.ask("start", prompt=prompt, seed=seed)
        return self.reply("started")

    def closed(self):
        """Code and reason of the socket's end, whatever comes before it."""
        with pytest.raises(ConnectionClosed) as end:
            while True:
                self.next()
        return end.value.rcvd.code, end.value.rcvd.reason


@contextlib.contextmanager
def serving(live=None, limit=2, idle=120.0, token=None, more=()):
    """A server that listens: its port, and the objects in it."""
    live = live or fake_live.FakeLive(limit)
    said = fake_live.hello(live.limit, idle)
    server = run.Listener(live, said, run.listen("127.0.0.1", 0), token, more)
    port = server.listener.getsockname()[1]
    failed = []

    def work():
        try:
            server.run()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield SimpleNamespace(port=port, live=live, server=server, failed=failed)
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
        assert not thread.is_alive()


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


def eventually(holds, every=0.01):
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, "did not come"
        time.sleep(every)


def get(port, path, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    connection.request("GET", path, headers=headers or {})
    answer = connection.getresponse()
    with contextlib.closing(connection):
        return answer.status, answer.headers, answer.read()


def counted(port, name, token=None):
    """The value of a metric, over all labels."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    lines = get(port, "/metrics", headers)[2].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"rfjax_{name}"))


def pixels(frame):
    return np.asarray(Image.open(io.BytesIO(frame.jpeg)).convert("RGB"))


# ----------------------------------------------------------------------------------------------------- protocol


def test_requests_are_read_as_they_are_meant():
    told = {"type": "start", "prompt": "  a red\n circle ", "seed": 2**32 - 1}
    assert protocol.parse(json.dumps(told)) == protocol.Start("a red circle", 2**32 - 1)
    assert protocol.parse('{"type": "prompt", "prompt": "é"}') == protocol.Prompt("é")
    assert protocol.parse('{"paused": false, "type": "pause"}') == protocol.Pause(False)
    assert protocol.parse('{"type": "stop"}') == protocol.Stop()
    assert protocol.parse('{"type": "stats"}') == protocol.Stats()


MALFORMED = [
    "",
    "hello",
    "[]",
    "null",
    "7",
    '"start"',
    "{}",
    '{"type": 1}',
    '{"type": ["start"]}',
    '{"type": "__class__"}',
    '{"type": "start"}',
    '{"type": "start", "prompt": "a", "seed": "1"}',
    '{"type": "start", "prompt": "a", "seed": 1.5}',
    '{"type": "start", "prompt": "a", "seed": true}',
    '{"type": "start", "prompt": "a", "seed": -1}',
    '{"type": "start", "prompt": "a", "seed": 4294967296}',
    '{"type": "start", "prompt": ["a"], "seed": 1}',
    '{"type": "start", "prompt": "a", "seed": 1, "file": "/etc/passwd"}',
    '{"type": "pause", "paused": 1}',
    '{"type": "stop", "slot": 0}',
    "[" * 16_000,
    '{"type": "start", "prompt": "a", "seed": ' + "9" * 10_000 + "}",
    b'{"type": "stop"}',
]


@pytest.mark.parametrize("message", MALFORMED, ids=lambda message: str(message[:40]))
def test_malformed_requests_are_refused_with_a_sentence(message):
    with pytest.raises(protocol.Refusal) as refusal:
        protocol.parse(message)
    assert refusal.value.code == "malformed" and str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    "prompt, says",
    [("a" * 2001, "2001 characters"), ("\0", "no text"), ("\ud800", "no text"), (" \n", "empty")],
)
def test_prompts_out_of_bounds_are_refused(prompt, says):
    with pytest.raises(protocol.Refusal, match=says) as refusal:
        protocol.parse(json.dumps({"type": "prompt", "prompt": prompt}))
    assert refusal.value.code == "prompt"
    assert protocol.parse(json.dumps({"type": "prompt", "prompt": "a" * 2000})).prompt == "a" * 2000


def test_the_rate_is_a_burst_and_then_so_many_a_second():
    rate = protocol.Rate()
    assert sum(rate.allows(100.0) for _ in range(50)) == protocol.BURST
    rate = protocol.Rate()
    allowed = sum(rate.allows(100 + second / 100) for second in range(1000))  # 100 a second for 10 s
    assert allowed == 22  # 20 / (1 - 10 / 100), and then none: who never lets up is not let in again
    rate = protocol.Rate()
    assert all(rate.allows(second / 9) for second in range(900))


def test_a_frame_comes_back_as_it_was():
    picture = shapes.render(shapes.sample_scene(1), 0, 1)[0]
    encoder = engine.Jpeg(64, 64, 16)
    for number in (0, 2**31):
        frame = protocol.Frame(number, 7, encoder.encode(picture))
        back = protocol.frame(protocol.binary(frame))
        assert back == frame
        assert np.abs(pixels(back) - picture.astype(float)).mean() < 2


def test_metrics_are_prometheus_text():
    counters = metrics.Counters()
    counters.add("frames_total", 12)
    counters.add("refused_total", label='reason="full"')
    counters.add("refused_total", 2, label='reason="prompt"')
    lines = metrics.render(counters.read() | {("places", ""): 3}).splitlines()
    assert "rfjax_frames_total 12" in lines and "# TYPE rfjax_frames_total counter" in lines
    assert (
        'rfjax_refused_total{reason="full"} 1' in lines and 'rfjax_refused_total{reason="prompt"} 2' in lines
    )
    assert "rfjax_places 3" in lines and "# TYPE rfjax_places gauge" in lines
    assert "rfjax_steps_total 0" in lines  # told before it first happens


# --------------------------------------------------------------------------------------------- engine and outbox


class Watcher:
    """A viewer that keeps all that it is sent."""

    def __init__(self):
        self.items, self.dropped = [], 0

    def deliver(self, item):
        self.items.append(item)

    @property
    def frames(self):
        return sum(isinstance(item, protocol.Frame) for item in self.items)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


class Still(fake_live.FakeLive):
    """Frames that take nothing to make."""

    def _block(self, stream):
        return np.zeros((len(super()._block(stream)) if stream[1] == 0 else 12, 64, 64, 3), np.uint8)


def test_each_viewer_is_kept_a_second_ahead_and_no_more(clock):
    """In hand after a step: at least AHEAD seconds, and less than AHEAD and a block; pauses do not change it."""
    made = engine.Engine(Still(2), metrics.Counters())
    watchers = [Watcher(), Watcher()]
    began, played = [100.0, 103.3], [0.0, 0.0]
    for tick in range(600):
        clock.seconds = 100 + tick / 10
        for watcher, start in zip(watchers, began, strict=True):
            if abs(clock.seconds - start) < 0.01:
                made._do(watcher, protocol.Start(RED, 0))
        paused = 20 <= clock.seconds - 100 < 40
        if tick in (200, 400):
            made._do(watchers[0], protocol.Pause(paused))
        for _ in range(6):  # as often as the ramp needs
            made._step()
        for index, watcher in enumerate(watchers):
            if clock.seconds >= began[index] - 0.01:
                hand = watcher.frames / 16 - played[index]
                assert engine.AHEAD - 1e-6 <= hand < engine.AHEAD + 12 / 16 + 0.11
                played[index] += 0.1 * (not (paused and index == 0))
    assert any(len(slots) == 1 for slots in made.live.stepped)


def test_a_stream_that_pauses_or_has_enough_is_not_stepped(clock):
    made = engine.Engine(fake_live.FakeLive(3), metrics.Counters())
    watchers = [Watcher() for _ in range(3)]
    for watcher in watchers:
        made._do(watcher, protocol.Start(RED, 0))
    for _ in range(10):
        made._step()
    made._do(watchers[0], protocol.Pause(True))
    made._do(watchers[2], protocol.Stop())
    made.live.stepped.clear()
    made._step()
    assert made.live.stepped == []  # all have more than a second
    clock.seconds += 100
    made._step()
    assert made.live.stepped == [(1,)]
    made._do(watchers[2], None)  # gone twice is gone
    assert made.taken == 2 and sorted(made.live.streams) == [0, 1]


def test_only_the_newest_frames_wait_for_a_slow_viewer():
    import asyncio

    async def outbox():
        box = viewer.Viewer(16, metrics.Counters())
        box.put(protocol.Paused(True))
        for number in range(1000):
            box.put(protocol.Frame(number, 0, b""))
        first, *frames = [await box.next() for _ in range(33)]
        assert json.loads(first) == {"type": "paused", "paused": True}
        assert [protocol.frame(frame).number for frame in frames] == list(range(968, 1000))
        assert box.dropped == 968
        box.put(protocol.Frame(1000, 0, b""))
        box.put(protocol.Started(RED, 0))  # what was before it is no longer wanted
        box.put(protocol.Frame(0, 0, b""))
        assert json.loads(await box.next())["type"] == "started"
        assert protocol.frame(await box.next()).number == 0
        assert box.dropped == 0 and not box.closing.done()
        for _ in range(viewer.REPLIES + 1):
            box.put(protocol.Stopped())
        assert box.closing.result()[0] == protocol.FORBIDDEN

    asyncio.run(outbox())


def test_the_real_batch_fits_the_engine():
    """Two streams of a tiny network with random weights, through requests and frames, and the words of its refusals."""
    from rfjax.serve import model

    args = command.parse(["--config", str(ROOT / "configs/tiny.py"), "--weights", "random", "--limit", "2"])
    live, said = model.load(args)
    assert (said.width, said.height) == (live.sampler.video.width, live.sampler.video.height)
    assert (said.places, said.idle_seconds) == (2, 120) and "star" in said.words["shape"]
    made, watchers = engine.Engine(live, metrics.Counters()), [Watcher(), Watcher()]
    for watcher in watchers:
        made._do(watcher, protocol.Start(said.examples[0], 3))
    while min(watcher.frames for watcher in watchers) < 21:
        made._step()
    one, other = (
        [item for item in watcher.items if isinstance(item, protocol.Frame)][:21] for watcher in watchers
    )
    assert one == other and pixels(one[0]).shape == (said.height, said.width, 3)
    made._do(watchers[0], protocol.Prompt("a dragon"))
    assert watchers[0].items[-1].code == "prompt" and "dragon" in watchers[0].items[-1].message
    made._do(watchers[0], protocol.Prompt(STAR))
    assert watchers[0].items[-1] == protocol.Prompted(STAR, 1)
    made._do(watchers[0], protocol.Start(STAR, 3))
    made._do(watchers[1], None)
    assert made.taken == 1
    made._do(watchers[1], protocol.Start(said.examples[0], 3))
    assert watchers[1].items[-1] == protocol.Started(said.examples[0], 3)


def test_the_encoder_of_prompts_is_read_once_and_keeps_nothing(monkeypatch, tmp_path):
    from rfjax.serve import model
    from rfjax.umt5 import UMT5Config

    read = []

    def reader(self, device):
        read.append(device)
        return lambda captions: [np.full((2, 4), len(caption), np.float32) for caption in captions]

    monkeypatch.setattr(model.prompts.PromptEncoder, "reader", reader)
    encoder = model.Resident(tmp_path, UMT5Config(dim=4, attn_dim=4, ffn_dim=4, num_heads=1, num_layers=1), 3)
    for caption in ("one", "seven"):
        expected = np.zeros((1, 3, 4), np.float32)
        expected[0, :2] = len(caption)
        np.testing.assert_array_equal(encoder.encode([caption]), expected)
    assert len(read) == 1 and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- server


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


def test_too_many_requests_end_the_socket(connect):
    client = connect()
    with contextlib.suppress(ConnectionClosed):
        for _ in range(200):
            client.ask("stats")
    assert client.closed() == (1008, "Too many requests at once.")


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1"]
)
def test_other_origins_are_refused(shared, origin):
    with pytest.raises(InvalidStatus) as refusal:
        Client(shared.port, origin=origin and origin.format(port=shared.port))
    assert refusal.value.response.status_code == 403


def test_origins_and_tokens_that_are_given(connect):
    with serving(token=TOKEN, more=("https://example.org",)) as server:
        client = connect(server.port, token=TOKEN, origin="https://example.org")
        client.reply("hello")
        assert client.socket.subprotocol == protocol.NAME
        for token in (None, "wrong", TOKEN[:-1], TOKEN + "x"):
            code, reason = connect(server.port, token=token).closed()
            assert code == 1008 and "token" in reason
        assert get(server.port, "/metrics")[0] == 401
        assert get(server.port, "/metrics", {"Authorization": "Bearer wrong"})[0] == 401
        assert get(server.port, "/health")[0] == 200
        assert counted(server.port, 'refused_total{reason="token"', TOKEN) == 4
        client.socket.close()


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


def test_a_slow_reader_loses_frames_and_the_others_none(connect):
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


def test_the_page_is_served_and_nothing_else(shared):
    for path, (name, kind) in app.PAGE.items():
        status, headers, body = get(shared.port, path)
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, kind)
        assert body == (ROOT / "rfjax/serve/static" / name).read_bytes() and body
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
    for path in (
        "/static/page.js",
        "/../setup.cfg",
        "/%2e%2e/setup.cfg",
        "//etc/passwd",
        "/page.js/..",
        "/engine.py",
    ):
        assert get(shared.port, path)[0] == 404
    names = {file.name for file in (ROOT / "rfjax/serve/static").iterdir()}
    assert names == {name for name, _ in app.PAGE.values()}


def test_the_page_asks_nothing_of_others_and_keeps_to_its_policy():
    """No address but this server's own, and nothing inline, which the policy would stop."""
    for file in (ROOT / "rfjax/serve/static").iterdir():
        found = re.findall(r"\w+://[^\"]*", file.read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg", "ws://", "wss://"}, file.name
        assert "innerHTML" not in file.read_text(), file.name
    page = (ROOT / "rfjax/serve/static/index.html").read_text()
    assert not re.search(r"\s(style|on\w+)=|<style|<script(?! type=\"module\" src=\"/)", page)


def test_health_tells_of_an_engine_that_has_failed(connect, capsys):
    class Broken(fake_live.FakeLive):
        def step(self, slots):
            raise RuntimeError("the accelerator is gone")

    with serving(Broken(1)) as server:
        client = connect(server.port)
        client.reply("hello")
        assert get(server.port, "/health")[0] == 200
        client.start()
        assert client.closed() == (protocol.BROKEN, "The server has failed.")
        eventually(lambda: server.failed)
        assert "accelerator is gone" in str(server.failed[0]) and not server.server.engine.healthy


def test_what_fails_while_compiling_is_raised():
    class Cold(fake_live.FakeLive):
        def warm(self):
            raise UserError("too large")

    with pytest.raises(UserError, match="too large"):
        run.Listener(Cold(1), fake_live.hello(1), run.listen("127.0.0.1", 0)).run()


def test_sigterm_closes_streams_with_a_reason_and_who_comes_back_is_served(capfd):
    """A process of its own: exit code 0 in mid-stream; started again on the same port, the same viewer goes on."""
    port = run.listen("127.0.0.1", 0).getsockname()[1]
    for number in (signal.SIGTERM, signal.SIGINT):
        with served.server("--port", str(port), "--limit", "1", fake=True) as (address, server):
            assert address == f"http://127.0.0.1:{port}"
            client = Client(port)
            client.reply("hello")
            client.start()
            client.watch(lambda frames: len(frames) > 20)
            server.send_signal(number)
            assert client.closed() == (1001, "The server is shutting down.")
            assert server.wait(DEADLINE) == 0
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--limit", "0"], "--limit"),
        (["--port", "70000"], "--port"),
        (["--idle", "nan"], "--idle"),
        (["--idle", "0"], "--idle"),
        (["--token", "short"], "8 to 128"),
        (["--origin", "example.org"], "--origin"),
        (["--origin", "https://example.org/"], "--origin"),
        (["--host", "1.2.3.4"], "Cannot listen on 1.2.3.4:8000"),
        (["--config", "none.py", "--port", "0"], "no config none.py"),
        (["--prot", "1"], "--help"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and says in error[0]


def test_a_port_that_is_taken_is_one_sentence(shared, capsys):
    with pytest.raises(SystemExit):
        command.main(["--port", str(shared.port)])
    assert f"Cannot listen on 127.0.0.1:{shared.port}: Address already in use" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys):
    for name in ("rfjax.serve.run", "rfjax.serve.app", "rfjax.serve.viewer"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delattr("rfjax.serve.run")
    with pytest.raises(SystemExit):
        command.main([])
    assert "pip install -e '.[serve]'" in capsys.readouterr().err

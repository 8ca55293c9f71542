"""Viewers over real sockets, and servers in this process with a batch that needs no network."""

import contextlib
import http.client
import json
import threading
import time
from types import SimpleNamespace

import fake_live
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from rfjax import shapes
from rfjax.serve import protocol, run

RED, STAR = shapes.PROMPTS[:2]
DEADLINE = 60.0  # seconds after which something that does not come counts as missing


class Client:
    """A viewer's end of the socket."""

    def __init__(self, port, token=None, **options):
        offered = [protocol.NAME, *([token] if token else [])]
        options = (
            dict(origin=f"http://127.0.0.1:{port}", subprotocols=offered, proxy=None, max_queue=None)
            | options
        )
        self.socket = connect(f"ws://127.0.0.1:{port}/stream", **options).__enter__()
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

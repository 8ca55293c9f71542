"""The live server as a site and as a command: who may come in, what is served, how it begins and ends."""

import re
import signal
import socket
import sys
from pathlib import Path

import fake_live
import pytest
import served
from clients import DEADLINE, Client, counted, eventually, get, serving
from websockets.exceptions import InvalidStatus

from rfjax.errors import UserError
from rfjax.serve import __main__ as command
from rfjax.serve import app, protocol, run, wire


def test_origins_are_compared_as_browsers_send_them():
    known = run.origins("127.0.0.1", 80, ("https://Example.org:443", "http://example.org:8080"))
    assert {"http://127.0.0.1", "http://localhost", "https://example.org", "http://example.org:8080"} <= known
    assert "http://127.0.0.1:8000" in run.origins("127.0.0.1", 8000, ())


ROOT = Path(__file__).parents[1]
TOKEN = "a-token_of-22-letters"


@pytest.fixture(scope="module")
def shared():
    """One server for the tests that leave it as it was."""
    with serving() as server:
        yield server


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1"]
)
def test_other_origins_are_refused(shared, origin):
    with pytest.raises(InvalidStatus) as refusal:
        Client(shared.port, origin=origin and origin.format(port=shared.port))
    assert refusal.value.response.status_code == 403


def test_origins_and_tokens_that_are_given():
    with serving(token=TOKEN, more=("https://example.org",)) as server:
        client = Client(server.port, token=TOKEN, origin="https://example.org")
        client.reply("hello")
        assert client.socket.subprotocol == protocol.NAME
        for token in (None, "wrong", TOKEN[:-1], TOKEN + "x"):
            code, reason = Client(server.port, token=token).closed()
            assert code == 1008 and "token" in reason
        assert get(server.port, "/metrics")[0] == 401
        assert get(server.port, "/metrics", {"Authorization": "Bearer wrong"})[0] == 401
        assert get(server.port, "/health")[0] == 200
        assert counted(server.port, 'refused_total{reason="token"', TOKEN) == 4
        client.socket.close()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "text/plain"),
        ("text/plain; version=abc", "text/plain"),
        ("application/openmetrics-text", "application/openmetrics-text"),
    ],
)
def test_metrics_come_in_the_format_that_is_asked_for(shared, accept, kind):
    status, headers, body = get(shared.port, "/metrics", {"Accept": accept})
    assert status == 200 and headers["content-type"].startswith(kind) and b"rfjax_places 2" in body


@pytest.mark.parametrize(
    "said", [b"", b"GET /stream HTTP/1.1\r\nUpgrade: webso", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET"]
)
def test_who_never_comes_to_an_end_is_dropped_and_others_are_not(monkeypatch, said):
    """A byte now and then does not help; a viewer stays."""
    monkeypatch.setattr(wire, "PATIENCE", 0.4)
    with serving() as server, socket.create_connection(("127.0.0.1", server.port), DEADLINE) as half:
        viewer = Client(server.port)
        viewer.reply("hello")
        half.sendall(said)

        def dropped():
            try:
                half.sendall(b"x" if said else b"")
                return not half.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True

        eventually(dropped, every=0.05)
        viewer.start()
        assert viewer.watch(lambda frames: len(frames) > 8)


def test_more_connections_than_there_may_be_are_dropped(monkeypatch):
    monkeypatch.setattr(wire, "CONNECTIONS", 2)
    with serving() as server:
        held = [socket.create_connection(("127.0.0.1", server.port), DEADLINE) for _ in range(3)]
        eventually(lambda: len(server.server.server_state.connections) == 2)
        assert held[2].recv(1) == b""
        held[0].close()
        eventually(lambda: len(server.server.server_state.connections) == 1)
        assert get(server.port, "/health")[0] == 200
        held[1].close()


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


def test_health_tells_of_an_engine_that_has_failed():
    class Broken(fake_live.FakeLive):
        def step(self, slots):
            raise RuntimeError("the accelerator is gone")

    with serving(Broken(1)) as server:
        client = Client(server.port)
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
        (
            ["--config", "none.py", "--port", "0", "--policy", "slowly"],
            "'slowly' is no way to change a prompt",
        ),
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

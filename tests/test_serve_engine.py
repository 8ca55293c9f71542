"""The thread that makes frames, by a clock of its own, and the outbox of a viewer."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import fake_live
import numpy as np
import pytest
from fake_live import pixels

from rfjax import shapes
from rfjax.serve import __main__ as command
from rfjax.serve import engine, metrics, protocol, viewer

ROOT = Path(__file__).parents[1]
RED, STAR = shapes.PROMPTS[:2]


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
    made = engine.Engine(Still(2), metrics.Metrics())
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
    made = engine.Engine(fake_live.FakeLive(3), metrics.Metrics())
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


def test_of_prompts_that_come_together_only_the_newest_is_read():
    """Three viewers: what is asked before a stop or a newer prompt costs nothing, and each request has its answer."""
    made = engine.Engine(fake_live.FakeLive(3), metrics.Metrics())
    red, star, gone = watchers = [Watcher() for _ in range(3)]
    read, change = [], made.live.change
    made.live.change = lambda slot, prompt: (read.append(prompt), change(slot, prompt))
    prompts = [shapes.PROMPTS[at % 4] for at in range(7)]
    made.tell(red, protocol.Start(RED, 0))
    for prompt in prompts:
        made.tell(red, protocol.Prompt(prompt))
        made.tell(star, protocol.Start(prompt, 1))
    made.tell(red, protocol.Stats())
    made.tell(gone, protocol.Start(RED, 0))
    made.tell(gone, None)
    assert made._obey() and read == prompts[-1:]
    late = [[getattr(item, "code", type(item)) for item in watcher.items] for watcher in watchers]
    assert late[0] == [protocol.Started, *6 * ["late"], protocol.Prompted, protocol.Figures]
    assert late[1] == [*6 * ["late"], protocol.Started] and late[2] == ["late"]
    assert red.items[-2] == protocol.Prompted(prompts[-1], 1) and star.items[-1].prompt == prompts[-1]
    assert made.taken == 2
    made._asked.put(None)  # as at its end
    assert not made._obey()


def test_a_stream_that_begins_anew_pays_for_no_change_of_prompt():
    made, watcher = engine.Engine(fake_live.FakeLive(1), metrics.Metrics()), Watcher()
    for request in (protocol.Start(RED, 0), protocol.Start(STAR, 1), protocol.Prompt(RED)):
        made._do(watcher, request)
    assert made.live.policies == ["keep", None]  # None: the server's


def test_only_the_newest_frames_wait_for_a_slow_viewer():
    async def outbox():
        box = viewer.Viewer(16, metrics.Metrics())
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
    made, watchers = engine.Engine(live, metrics.Metrics()), [Watcher(), Watcher()]
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

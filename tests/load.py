"""The live server under load, by hand:

    python tests/load.py crowd --seconds 120     # 50 viewers who come and go, most of them badly behaved
    python tests/load.py stream --minutes 30     # one viewer for long: memory, rate, and what the detector sees

`--fake` takes the batch without a network in place of the shipped model. Ends with exit code 1 where something does not hold.
"""

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import random
import socket
import statistics
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image
from served import Checks, server
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from rfjax import shapes
from rfjax.score import score
from rfjax.serve import protocol

GROWTH = 24e6  # bytes that the server's memory may grow by
DEVICE = 1e5  # and what lies on its accelerator
PING = b"\x89\x80\0\0\0\0"  # a client's, on the wire
FRAMES = 960  # a minute of them, at each end of a long stream
BAD = [
    b"\0",
    "no json",
    "[" * 9000,
    '{"type": "start"}',
    '{"type": "start", "prompt": "a dragon", "seed": 1}',
    "{}",
]


def opened(address: str, **options):
    """A viewer's socket; `async with opened(…) as socket`."""
    url = address.replace("http", "ws") + "/stream"
    options = dict(origin=address, subprotocols=[protocol.NAME], proxy=None, close_timeout=2) | options
    return connect(url, **options)


def ask(viewer, kind: str, **fields):
    return viewer.send(json.dumps({"type": kind, **fields}))


def measured(address: str) -> dict[str, float]:
    """The server's metrics, summed over labels."""
    sums: dict[str, float] = {}
    with urllib.request.urlopen(address + "/metrics", timeout=60) as answer:
        for line in answer.read().decode().splitlines():
            if not line.startswith("#"):
                name, value = line.split()
                name = name.partition("{")[0].removeprefix("rfjax_")
                sums[name] = sums.get(name, 0) + float(value)
    return sums


class Watcher:
    """A well-behaved viewer: frames without a gap, at the rate that they play."""

    def __init__(self):
        self.times, self.numbers, self.end, self.other = [], [], None, []

    async def watch(self, address: str, frame=lambda message: None) -> None:
        """Until the server ends the stream; `frame` is called with each binary message."""
        async with opened(address, max_queue=None) as viewer:
            await ask(viewer, "start", prompt=shapes.PROMPTS[0], seed=1)
            keeping = asyncio.create_task(self._ask(viewer))
            try:
                async for message in viewer:
                    if isinstance(message, bytes):
                        self.times.append(time.monotonic())
                        self.numbers.append(protocol.frame(message).number)
                        frame(message)
                    else:
                        self.other.append(json.loads(message)["type"])
            except ConnectionClosed:
                pass
            finally:
                keeping.cancel()
            self.end = (viewer.close_code, viewer.close_reason)

    async def _ask(self, viewer) -> None:
        while True:
            await asyncio.sleep(10)
            await ask(viewer, "stats")

    @property
    def gaps(self) -> int:
        return sum(after != before + 1 for before, after in zip(self.numbers, self.numbers[1:], strict=False))

    def rate(self, frames: slice = slice(None)) -> float:
        times = self.times[frames]
        return (len(times) - 1) / (times[-1] - times[0])

    def longest(self) -> float:
        """The longest time without a frame, in seconds."""
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


# ------------------------------------------------------------------------------------------------ who comes and goes


async def ordinary(address: str, rng: random.Random) -> None:
    async with opened(address) as viewer:
        await ask(viewer, "start", prompt=rng.choice(shapes.PROMPTS), seed=rng.randrange(100))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.5, 6)):
                async for _ in viewer:
                    if rng.random() < 0.01:
                        await ask(viewer, "prompt", prompt=rng.choice(shapes.PROMPTS))


async def malformed(address: str, rng: random.Random) -> None:
    async with opened(address) as viewer:
        for _ in range(30):
            await viewer.send(rng.choice(BAD))
            await asyncio.sleep(rng.uniform(0, 0.2))


async def huge(address: str, rng: random.Random) -> None:
    async with opened(address) as viewer:
        await viewer.send("x" * 10_000_000)


async def flood(address: str, rng: random.Random) -> None:
    async with opened(address) as viewer:
        for _ in range(2000):
            await ask(viewer, "stats")
            await asyncio.sleep(0)


async def pings(address: str, rng: random.Random) -> None:
    """Many, whose answers it does not read."""
    async with opened(address) as viewer:
        viewer.transport.pause_reading()
        for _ in range(100):
            if not viewer.transport.is_closing():
                viewer.transport.write(1000 * PING)
            await asyncio.sleep(0.01)
        viewer.transport.resume_reading()
        await viewer.wait_closed()


async def slow(address: str, rng: random.Random) -> None:
    """Starts, and reads nothing."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    host, port = address.removeprefix("http://").split(":")
    await asyncio.get_running_loop().sock_connect(narrow, (host, int(port)))
    async with opened(address, max_queue=1, sock=narrow) as viewer:
        await ask(viewer, "start", prompt=rng.choice(shapes.PROMPTS), seed=0)
        await asyncio.sleep(rng.uniform(3, 12))


async def gone(address: str, rng: random.Random) -> None:
    """Starts, and vanishes without a word."""
    async with opened(address) as viewer:
        await ask(viewer, "start", prompt=rng.choice(shapes.PROMPTS), seed=0)
        await asyncio.sleep(rng.uniform(0, 3))
        viewer.transport.abort()


async def half_open(address: str, rng: random.Random) -> None:
    """Half of a handshake, or bytes that are none of HTTP."""
    host, port = address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(rng.choice([b"GET /stream HTTP/1.1\r\nUpgrade: webso", b"\x16\x03\x01\x00\xa5", b""]))
    await asyncio.sleep(rng.uniform(0, 8))
    writer.close()


KINDS = [ordinary, ordinary, malformed, huge, flood, pings, slow, gone, half_open]


async def visitor(address: str, seed: int, end: float, visits: Counter, endings: Counter) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end:
        kind = rng.choice(KINDS)
        try:
            await kind(address, rng)
        except ConnectionClosed as error:
            endings[(error.rcvd.code, error.rcvd.reason) if error.rcvd else None] += 1
        except (WebSocketException, OSError, TimeoutError, EOFError):
            pass
        visits[kind.__name__] += 1
        await asyncio.sleep(rng.uniform(0, 1))


def visitors(address: str, clients: int, seconds: float) -> tuple[Counter, Counter]:
    """So many visitors at a time, in a process of their own; how often each kind has come, and how each socket was ended.

    An ending is the server's (code, reason), or None where it was lost with what the server did not read.
    """

    async def all_of_them() -> tuple[Counter, Counter]:
        visits, endings, end = Counter(), Counter(), time.monotonic() + seconds
        await asyncio.gather(*(visitor(address, seed, end, visits, endings) for seed in range(clients)))
        return visits, endings

    return asyncio.run(all_of_them())


async def memory(address: str, seen: list[dict[str, float]]) -> None:
    """The server's metrics, every second."""
    while True:
        seen.append(await asyncio.to_thread(measured, address))
        await asyncio.sleep(1)


def flat(seen: list[dict[str, float]], part: int, check: Checks) -> None:
    """Memory in the last of so many parts of the time, against the second of them, by their medians."""
    length = max(1, len(seen) // part)
    for name, most in (("process_resident", GROWTH), ("device", DEVICE)):
        values = [metrics[f"{name}_memory_bytes"] for metrics in seen]
        early, late = statistics.median(values[length : 2 * length]), statistics.median(values[-length:])
        told = f"{early / 1e6:.1f} MB in the second 1/{part} of the time, {late / 1e6:.1f} MB in the last"
        check(f"{name} memory is flat", late - early < most, told)


def codes(endings: Counter) -> set[int]:
    return {ending[0] for ending in endings if ending}


async def crowd(address: str, process, seconds: float, clients: int, check: Checks) -> None:
    watcher, seen = Watcher(), []
    watching = asyncio.create_task(watcher.watch(address))
    sampling = asyncio.create_task(memory(address, seen))
    await asyncio.sleep(5)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        came = asyncio.get_running_loop().run_in_executor(apart, visitors, address, clients, seconds)
        visits, endings = await came
    await asyncio.sleep(3)
    sampling.cancel()
    now = await asyncio.to_thread(measured, address)
    print(f"visits: {dict(visits)}")
    print(f"dropped {now['frames_dropped_total']:.0f} frames, refused {now['refused_total']:.0f} requests")
    for ending, count in endings.most_common():
        print(f"     ended {count} times: {ending}")
    told = [ending for ending in endings if ending and not ending[1]]
    check(
        "every socket that the server ended was told why", {1008, 1009} <= codes(endings) and not told, told
    )
    check("all kinds came", len(visits) == len(set(KINDS)))
    flat(seen, 3, check)
    check("a well-behaved viewer lost no frame", watcher.gaps == 0, f"{len(watcher.times)} frames")
    told = f"{watcher.rate():.2f} fps, at most {watcher.longest():.2f} s between two frames"
    check("and had them at 15 fps or more", watcher.rate() >= 15, told)
    check(
        "those who left are gone", now["viewers"] == 1 and now["streams"] == 1, f"{now['viewers']:.0f} viewer"
    )
    process.terminate()
    code = await asyncio.to_thread(process.wait, 60)
    await watching
    check("SIGTERM in mid-stream: exit code 0, a reason", code == 0 and watcher.end[0] == 1001, watcher.end)


# ------------------------------------------------------------------------------------------------------ for long


async def stream(address: str, process, minutes: float, check: Checks) -> None:
    watcher, seen, first, last = Watcher(), [], [], []

    def keep(message: bytes) -> None:
        jpeg = protocol.frame(message).jpeg
        (first if len(first) < FRAMES else last).append(jpeg)
        del last[:-FRAMES]

    watching = asyncio.create_task(watcher.watch(address, keep))
    sampling = asyncio.create_task(memory(address, seen))
    await asyncio.sleep(60 * minutes)
    sampling.cancel()
    process.terminate()
    await watching
    frames = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in (*first, *last)]
    scored = score(np.stack(frames), shapes.PROMPTS[0])
    flat(seen, 10, check)
    rates = [watcher.rate(part) for part in (slice(0, FRAMES), slice(-FRAMES, None))]
    check(
        "15 fps or more",
        min(rates) >= 15,
        f"{rates[0]:.2f} fps in the first minute, {rates[1]:.2f} in the last",
    )
    check(
        "no frame is lost",
        watcher.gaps == 0,
        f"{len(watcher.times)} frames, at most {watcher.longest():.2f} s between two",
    )
    half = len(first) // 16
    for name, right in scored["seconds"].items():
        shares = right[:half].mean(), right[half:].mean()
        check(
            f"{name} is right",
            shares[1] >= shares[0] - 0.1,
            f"{shares[0]:.0%} of the first minute, {shares[1]:.0%} of the last",
        )
    for name in ("hue", "background"):
        drift = scored["drift"][name]
        early, late = np.nanmean(drift[:half]), np.nanmean(drift[half:])
        print(f"     drift of {name}: {early:.1f} in the first minute, {late:.1f} in the last")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("crowd", "stream"))
    parser.add_argument(
        "--fake", action="store_true", help="the batch without a network in place of the model"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="that the crowd stays (default 120)")
    parser.add_argument("--clients", type=int, default=50, help="in the crowd (default 50)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the stream (default 30)")
    parser.add_argument("--limit", type=int, default=4, help="places of the server (default 4)")
    args = parser.parse_args()
    check = Checks()
    with server("--port", "0", "--limit", str(args.limit), fake=args.fake) as (address, process):
        if args.what == "crowd":
            asyncio.run(crowd(address, process, args.seconds, args.clients, check))
        else:
            asyncio.run(stream(address, process, args.minutes, check))
    sys.exit(check.failed > 0)


if __name__ == "__main__":
    main()

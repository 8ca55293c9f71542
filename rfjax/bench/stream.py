"""A stream as its viewer sees it: blocks of frames that arrive one after another."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rfjax import compilation, rollout, sampler
from rfjax.bench import timing

SAMPLES = 50  # of memory, at most, over a run
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of what getrusage tells


def first(model: sampler.Sampler, captions: list[str], method: str, decoded: bool) -> None:
    """Makes the first block of a clip, as `arrivals` has it, and leaves nothing under way."""
    blocks = model.latents(captions, 0, model.rollout.block_frames, method)
    next(model.decode(blocks) if decoded else map(jax.block_until_ready, blocks))


def arrivals(model: sampler.Sampler, captions: list[str], method: str, decoded: bool) -> Iterator[Any]:
    """Blocks of an endless clip as they are there: frames on the host, or latents on the device."""
    endless = int(rollout.ENDLESS) * model.rollout.block_frames
    latents = model.latents(captions, 0, endless, method)
    return model.decode(latents) if decoded else map(jax.block_until_ready, _ahead(latents))


def _ahead(blocks: Iterator[Any]) -> Iterator[Any]:
    """The same blocks, each handed out when the next is under way, as `Sampler.decode` does it."""
    ready = next(blocks)
    for block in blocks:
        yield ready
        ready = block


def measure(
    model: sampler.Sampler,
    captions: list[str],
    method: str,
    decoded: bool,
    blocks: int,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Figures of `blocks` blocks in a row of the steady state, and of the memory meanwhile.

    They end early with the block that is there when `seconds` of them are over.

    "blocks" and "frames" (of each clip); "frames_per_s" (of all clips); "block_latency" and "frame_latency": percentiles of the
    time between two arrivals, and of its share of a frame; "drift" of that time; "intervals_s": all of them; "memory":
    `memory_now` at SAMPLES moments of the whole, and at an early end; "compilations": of programs, before the first counted
    block and after it.
    """
    compiled, frames = compilation.counter(), sampler.block_lengths(model.vae.config, model.rollout)[1]
    coming, warm_up = arrivals(model, captions, method, decoded), model.rollout.span_blocks + 2
    for _ in range(warm_up):  # until nothing is masked, and as many more as are under way
        next(coming)
    before, samples = compiled(), []
    moments = set(np.linspace(0, blocks - 1, SAMPLES, dtype=int).tolist())
    arrived = [time.perf_counter()]
    end = arrived[0] + (math.inf if seconds is None else seconds)
    for index in range(blocks):
        next(coming)
        arrived.append(time.perf_counter())
        if index in moments or arrived[-1] >= end:
            samples.append({"block": index} | memory_now())
        if arrived[-1] >= end:
            break
    intervals = np.diff(arrived)
    return {
        "blocks": len(intervals),
        "frames": len(intervals) * frames,
        "frames_per_s": len(captions) * frames * len(intervals) / float(intervals.sum()),
        "block_latency": timing.percentiles(intervals),
        "frame_latency": timing.percentiles(intervals / frames),
        "drift": timing.drift(intervals),
        "intervals_s": [round(float(taken), 7) for taken in intervals],
        "memory": samples,
        "compilations": {"warm_up": before, "measured": compiled() - before},
    }


def memory_now() -> dict[str, int]:
    """Bytes: of the arrays that are alive, of the process, and where devices tell it of the fullest one's memory."""
    found = {"live": sum(array.nbytes for array in jax.live_arrays()), "process": _process()}
    return found | _device("bytes_in_use")


def memory_peak() -> dict[str, int]:
    """The most bytes so far: of the process, and where devices tell it of the fullest one's memory."""
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT}
    return found | _device("peak_bytes_in_use")


def _device(which: str) -> dict[str, int]:
    """{"device": bytes} of the fullest of this process's devices; empty where they do not tell."""
    told = [(device.memory_stats() or {}).get(which) for device in jax.local_devices()]
    known = [size for size in told if size is not None]
    return {"device": max(known)} if known else {}


def _process() -> int:
    """Resident bytes; the most so far where the system does not tell the present."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT

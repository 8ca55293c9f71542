"""Durations: of one call, timed again and again, and of many in a row."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

WARM_UP = 2  # calls that are not counted: the first compiles, the second may still find caches cold
FEWEST, MOST, ENOUGH = 5, 100, 5.0  # calls, calls, seconds
MINUTE = 60.0


def timed(call: Callable[[], Any]) -> list[float]:
    """Seconds of each of FEWEST to MOST calls, about ENOUGH in all; each waits until its result is there."""
    for _ in range(WARM_UP):
        jax.block_until_ready(call())
    taken = []
    while len(taken) < FEWEST or (len(taken) < MOST and sum(taken) < ENOUGH):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return taken


def summary(taken: list[float]) -> dict[str, float]:
    """Of calls of the same program: median_s, min_s, max_s and how many calls."""
    return {
        "median_s": float(np.median(taken)),
        "min_s": min(taken),
        "max_s": max(taken),
        "calls": len(taken),
    }


def percentiles(taken: np.ndarray) -> dict[str, float]:
    """p50_s, p95_s, p99_s and max_s of durations [N]."""
    said = {f"p{share}_s": float(np.percentile(taken, share)) for share in (50, 95, 99)}
    return said | {"max_s": float(taken.max())}


def drift(taken: np.ndarray) -> dict[str, Any]:
    """Medians of durations [N] in a row at their start and at their end, and last / first - 1.

    Start and end are a minute each, or of less than two minutes a tenth of them; {} where a tenth is less than two.
    """
    if len(taken) < 20:
        return {}
    ends = np.cumsum(taken)
    if ends[-1] >= 2 * MINUTE and ends[0] <= MINUTE:
        over, first, last = "minute", taken[ends <= MINUTE], taken[ends > ends[-1] - MINUTE]
    else:
        count = len(taken) // 10
        over, first, last = "tenth", taken[:count], taken[-count:]
    first, last = float(np.median(first)), float(np.median(last))
    return {"over": over, "first_s": first, "last_s": last, "change": last / first - 1}

"""Counts and gauges in Prometheus's text format (version 0.0.4)."""

import threading
from pathlib import Path

import jax

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "places": "Streams that fit into the batch.",
    "streams": "Streams that have a place.",
    "viewers": "Sockets that are open.",
    "frames_total": "Frames made for viewers.",
    "frames_dropped_total": "Frames not sent because their viewer was too slow.",
    "steps_total": "Steps of the batch.",
    "step_seconds_total": "Time spent in steps.",
    "first_frame_seconds_total": "Time from starts to first frames.",
    "first_frames_total": "Starts whose first frame was made.",
    "requests_total": "Requests by type.",
    "refused_total": "Requests and sockets that were refused, by reason.",
    "closed_total": "Sockets that the server closed, by code.",
    "resident_memory_bytes": "Memory of the process.",
    "device_memory_bytes": "Arrays that lie on the accelerator.",
}


class Counters:
    """Sums by name and label; any thread may add."""

    def __init__(self):
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], float] = {}

    def add(self, name: str, value: float = 1, label: str = "") -> None:
        """Adds to the sum; `label` is like 'reason="full"' and is never of a viewer's making."""
        with self._lock:
            self._sums[name, label] = self._sums.get((name, label), 0) + value

    def read(self) -> dict[tuple[str, str], float]:
        with self._lock:
            return dict(self._sums)


def render(values: dict[tuple[str, str], float]) -> str:
    """{(name, label): value} → the text that Prometheus reads."""
    lines = []
    for name, told in HELP.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP rfjax_{name} {told}", f"# TYPE rfjax_{name} {kind}"]
        found = {label: value for (other, label), value in values.items() if other == name} or {"": 0}
        lines += [
            f"rfjax_{name}{{{label}}} {value:.15g}" if label else f"rfjax_{name} {value:.15g}"
            for label, value in sorted(found.items())
        ]
    return "\n".join(lines) + "\n"


def on_device() -> float:
    """Bytes of all arrays that are there, weights included; not what a program needs while it runs."""
    return float(sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted()))


def resident() -> float:
    """Bytes of memory that this process holds; 0 where the system does not say (no Linux)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line), 0.0)

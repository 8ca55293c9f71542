"""What the server counts, as Prometheus collects it."""

import functools

import jax
import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

prometheus_client.disable_created_metrics()  # the time at which each count began, which nobody asks for
FIRST = (
    0.1,
    0.2,
    0.5,
    1,
    2,
    5,
    10,
    20,
    60,
    180,
)  # seconds: bounds of the histogram, of small worlds and of Wan's size


class Metrics:
    """A server's counts and gauges in a `registry` of their own; any thread may add."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        count, gauge, times = (
            functools.partial(kind, namespace="rfjax", registry=self.registry)
            for kind in (Counter, Gauge, Histogram)
        )
        self.places = gauge("places", "Streams that fit into the batch.")
        self.streams = gauge("streams", "Streams that have a place.")
        self.viewers = gauge("viewers", "Sockets that are open.")
        self.frames = count("frames", "Frames made for viewers.")
        self.dropped = count("frames_dropped", "Frames not sent because their viewer was too slow.")
        self.steps = times("step_seconds", "Time of a step of the batch.")
        self.first_frames = times(
            "first_frame_seconds", "Time from a start to its first frame.", buckets=FIRST
        )
        # Labels are the protocol's words, never of a viewer's making.
        self.requests = count("requests", "Requests by type.", ["type"])
        self.refused = count("refused", "Requests and sockets that were refused, by reason.", ["reason"])
        self.closed = count("closed", "Sockets that the server closed, by code.", ["code"])
        memory = gauge("device_memory_bytes", "Arrays that lie on the accelerator.")
        memory.set_function(on_device)
        prometheus_client.ProcessCollector(registry=self.registry)  # memory, time, open files; Linux alone


def on_device() -> float:
    """Bytes of all arrays that are there, weights included; not what a program needs while it runs."""
    return float(sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted()))

"""What viewer and server tell each other: requests, frames, rates, and the counts that Prometheus reads."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from fake_live import pixels
from prometheus_client import generate_latest

from rfjax import shapes
from rfjax.serve import engine, metrics, protocol


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
    rate = protocol.Rate(per_second=100, burst=300)
    assert rate.allows(7.0, 300) and not rate.allows(7.0) and rate.allows(8.0, 99) and not rate.allows(8.0)


@pytest.mark.parametrize("fps", [16, 23.976, 30000 / 1001])
def test_a_frame_comes_back_as_it_was(fps):
    picture = shapes.render(shapes.sample_scene(1), 0, 1)[0]
    encoder = engine.Jpeg(64, 64, fps)
    for number in (0, 2**31):
        frame = protocol.Frame(number, 7, encoder.encode(picture))
        back = protocol.frame(protocol.binary(frame))
        assert back == frame
        assert np.abs(pixels(back) - picture.astype(float)).mean() < 2


def test_metrics_are_prometheus_text():
    counted = metrics.Metrics()
    counted.frames.inc(12)
    counted.refused.labels("full").inc()
    counted.refused.labels("prompt").inc(2)
    counted.steps.observe(0.02)
    lines = generate_latest(counted.registry).decode().splitlines()
    assert "rfjax_frames_total 12.0" in lines and "# TYPE rfjax_frames_total counter" in lines
    assert {'rfjax_refused_total{reason="full"} 1.0', 'rfjax_refused_total{reason="prompt"} 2.0'} <= set(
        lines
    )
    assert {'rfjax_step_seconds_bucket{le="0.025"} 1.0', "rfjax_step_seconds_count 1.0"} <= set(lines)
    assert "rfjax_first_frame_seconds_count 0.0" in lines  # told before it first happens
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)
    assert not [line for line in lines if "_created" in line]


def test_arrays_on_the_device_are_counted():
    before = metrics.on_device()
    held = jnp.zeros(1000, jnp.float32)
    assert metrics.on_device() == before + 4000
    held.delete()
    assert metrics.on_device() == before

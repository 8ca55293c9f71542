"""One pass over a finished block and the next window gives the two calls' numbers: only then do its times say anything."""

import sys
from pathlib import Path

import jax
import pytest
import tiny
from test_rollout import CONFIGS, frame_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fused_call  # noqa: E402

LONG = CONFIGS["rolling"].__class__((1000, 600), block_frames=2, sink_blocks=2, ring_blocks=6, span_blocks=6)


@pytest.mark.parametrize("config", [CONFIGS["rolling"], LONG], ids=["rolling", "several cached blocks"])
def test_one_pass_gives_the_numbers_of_two_calls(config, monkeypatch):
    model = tiny.model(config)

    def run(program):
        return fused_call.prepared(program, model, frame_shape(config))()

    two = run(fused_call.apart)
    assert fused_call.difference(two, run(fused_call.together)) < 1e-4
    jax.clear_caches()
    monkeypatch.setattr(fused_call, "in_two", lambda seen, look, args, kwargs, context: look(*args, **kwargs))
    assert fused_call.difference(two, run(fused_call.together)) > 1e-2  # where all see all

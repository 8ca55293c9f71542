"""`python tests/streams.py`: streams on 8 host devices are those of one device, and send what a closed form says.

pytest's flags work (`-k frames`).
"""

import functools
import json
import os
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

import jax
import numpy as np
import pytest

from rfjax import compilation, config, live, placement, sampler
from rfjax.bench import __main__ as bench
from rfjax.bench import parts, timing
from rfjax.preflight import compiled, programs

TINY = Path(__file__).parents[1] / "configs/tiny.py"
BLOCKS = 10  # the last two of the steady state
PROMPTS = [
    "a large red circle bouncing over a blue background",
    "a small blue star orbiting over a red background",
]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time is compiling, and numbers are no better for it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def settings():
    """The tiny model with 4 tokens a frame and words that nobody reads."""
    found = config.load(str(TINY))
    sampler.resize(found, "32x32")
    return found


@pytest.fixture(scope="module")
def alone(settings):
    return sampler.load(settings)


def shown(model, method="rolling", clips=4):
    """Frames uint8 [B, F, H, W, 3] of clips that differ."""
    latents = model.latents((PROMPTS * 2)[:clips], 3, BLOCKS * model.rollout.block_frames, method)
    return np.concatenate(list(model.decode(latents)), 1)


@pytest.fixture(scope="module")
def expected(alone):
    return functools.cache(lambda method: shown(alone, method))


@pytest.mark.parametrize("method", ["rolling", "self_forcing"])
@pytest.mark.parametrize(
    "words", ["2", "data=4", "decoder=1", "data=2,context=2", "data=2,context=2,decoder=2"]
)
def test_frames_are_those_of_one_device(alone, expected, words, method):
    model = alone.over(placement.parse(words))
    frames = shown(model, method)
    assert np.ptp(frames) > 100  # there is something to see
    assert np.abs(frames.astype(int) - expected(method)).max() <= 1
    programs = compilation.counter()
    np.testing.assert_array_equal(shown(model, method), frames)
    assert programs() == 0, "a second clip compiles nothing"


def test_new_prompts_and_seeds_do_what_they_do_on_one_device(alone):
    """Four clips on all axes at once, through every kind of change and a reset: what is cached, under way and said is split too."""

    def told(model):
        stream = live.Stream(model, [PROMPTS[0]] * 4, seed=3)
        frames = [next(stream) for _ in range(4)]
        stream.change([*PROMPTS, *PROMPTS], "renoise:2+recache:sink+crossfade:2")
        frames += [next(stream) for _ in range(3)]
        stream.reset(5)
        return np.concatenate([*frames, next(stream)], 1).astype(int)

    frames, expected = told(alone.over(placement.parse("data=2,context=2,decoder=2"))), told(alone)
    assert np.ptp(expected) > 100
    assert np.abs(frames - expected).max() <= 1


def test_the_benchmark_tells_what_a_block_sends(settings, tmp_path, monkeypatch):
    """With n devices along context, a layer sends 6 (n-1)/n² of an activation: q, k, v, the result; text: q, the result."""
    monkeypatch.setattr(timing, "ENOUGH", 0.01)
    flags = [
        "--config",
        str(TINY),
        "--size",
        "32x32",
        "--parts",
        "step,decode,stream",
        "--blocks",
        "3",
        "--samples",
        "2",
    ]
    bench.main([*flags, "--devices", "data=2,context=2,decoder=1", "--json", str(tmp_path / "run.json")])
    told = json.loads((tmp_path / "run.json").read_text())
    dit, rollout = settings.dit, settings.rollout
    frames = (len(rollout.steps) + 1) * rollout.block_frames  # of the window and the clean call
    activation = frames * 16 * dit.dim * 4  # bytes of a clip, 16 tokens a frame
    assert told["sent"]["all-to-all"] == dit.num_layers * 6 * activation / 4
    assert set(told["sent"]) == {"all-to-all", "all-gather"}  # the latter of latents alone
    latents = frames * 8 * 8 * dit.in_dim * 4
    assert told["sent"]["all-gather"] <= 2 * latents
    assert told["run"]["devices"] == {"data": 2, "context": 2, "decoder": 1}
    assert told["stream"]["compilations"]["measured"] == 0


def test_preflight_compiles_the_program_that_runs(settings, alone):
    devices = placement.parse("data=2,context=2")
    running = parts.sent(alone.over(devices), [settings.prompt] * 2, "rolling")
    told = compiled.measure(
        programs.sampling(settings, placement.place(devices), 2, "rolling"), ["window", "decoder"]
    )
    assert told["window"]["collectives"] == running
    assert told["decoder"]["collectives"] == {}
    whole = compiled.measure(
        programs.sampling(settings, placement.place(placement.Devices()), 2, "rolling"), ["window"]
    )
    named = programs.sampling(settings, placement.place(placement.parse("decoder=1")), 2, "rolling")
    apart = compiled.measure(named, ["window"])["window"]["elsewhere"]
    decoder = sum(programs.shares(named["decoder"].args).values())  # lies on a device of its own
    assert apart == whole["window"]["elsewhere"] - decoder
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(alone.params["dit"]))
    carried, split = (found["window"]["arguments"] - params for found in (whole, told))
    assert split < 0.3 * carried  # a quarter, and the window over clips alone


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))

"""Streams in one batch against the same streams alone, and the promises of a long run: no program anew, no memory more."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rfjax import change, compilation, config, placement, sampler
from rfjax import live as live_streams
from rfjax.errors import UserError
from rfjax.live import Full, Live, Stream

RED, BLUE = (
    "a large red circle bouncing over a blue background",
    "a small blue star spinning over a red background",
)
TINY = Path(__file__).parents[1] / "configs/tiny.py"
EVERY = ["keep", "renoise:2", "recache", "recache:sink", "crossfade:3", "renoise:9+recache:sink+crossfade:2"]


@pytest.fixture(scope="module")
def model():
    return sampler.load(config.load(str(TINY)))


@pytest.fixture(scope="module")
def warm(model):
    live = Live(model, 4)
    live.warm()
    return live


@pytest.fixture
def live(warm):
    """Four free slots."""
    yield warm
    for slot, place in enumerate(warm._places):
        if place:
            warm.leave(slot)


def alone(model, prompt, seed, blocks, turns=()):
    """The frames of a prompt and seed by themselves; turns: (blocks before it, prompt, policy)."""
    stream = model.latents([prompt], seed, 3 * blocks + 12, recall=True)  # its end is not seen

    def turned():
        for count in range(blocks):
            for at, prompt, policy in turns:
                if at == count:
                    stream.change(model.bind([prompt]).text_kv, change.parse(policy))
            yield next(stream)

    return np.concatenate(list(model.decode(turned())), 1)[0]


def shown(live, *rounds):
    """The frames of each slot over rounds of (how often, slots)."""
    videos = {}
    for count, slots in rounds:
        for _ in range(count):
            for slot, frames in live.step(slots).items():
                videos.setdefault(slot, []).append(frames)
    return {slot: np.concatenate(parts) for slot, parts in videos.items()}


def assert_same(video, other):
    assert video.shape == other.shape and video.std() > 10
    np.testing.assert_allclose(video.astype(int), other.astype(int), atol=1)


def test_streams_that_begin_and_pause_at_any_time_are_those_alone(model, live):
    """Slots 0, 1, 2 run 15, 12 and 5 steps, in batches of 1, 2 and, filled up, 4, masked and in the steady state."""
    first = live.join(RED, 3)
    before = shown(live, (2, [first]))
    second = live.join(BLUE, 2**32 - 1)
    some = shown(live, (3, [first, second]))
    third = live.join(RED, 4)
    more = shown(live, (1, [second]), (3, [third, second, first]), (2, [first, third]), (5, (second, first)))
    assert (first, second, third) == (0, 1, 2) and before == {}
    for slot, prompt, seed, blocks in ((0, RED, 3, 12), (1, BLUE, 2**32 - 1, 9), (2, RED, 4, 2)):
        parts = [part[slot] for part in (some, more) if slot in part]
        assert_same(np.concatenate(parts), alone(model, prompt, seed, blocks))


@pytest.mark.parametrize("policy", EVERY)
def test_a_new_prompt_does_what_it_does_to_the_stream_alone(model, live, policy):
    slot, other = live.join(RED, 1), live.join(BLUE, 2)
    before = shown(live, (10, [slot, other]))  # 7 blocks
    live.change(slot, BLUE, policy)
    after = shown(live, (3, [slot, other]))
    video = np.concatenate([before[slot], after[slot]])
    assert_same(video, alone(model, RED, 1, 10, [(7, BLUE, policy)]))
    assert np.abs(video - alone(model, RED, 1, 10).astype(int))[len(before[slot]) :].mean() > 5
    assert_same(np.concatenate([before[other], after[other]]), alone(model, BLUE, 2, 10))


def test_a_restart_is_another_stream_under_the_prompt_given_last(model, live):
    slot = live.join(RED, 1)
    shown(live, (6, [slot]))
    live.change(slot, BLUE, "crossfade:5")
    live.step([slot])
    live.restart(slot, 9)
    assert_same(shown(live, (6, [slot]))[slot], alone(model, BLUE, 9, 3))


def test_after_warming_up_nothing_compiles_and_memory_does_not_grow(live):
    live.leave(live.join(BLUE, 0))
    compiled, used = compilation.counter(), []
    for turn in range(3):
        slots = [live.join(RED, seed) for seed in (turn, 2**31 + turn, 5, 6)]
        for count in (1, 2, 3, 4):
            shown(live, (5, slots[:count]))
        for slot, policy in zip(slots * 2, EVERY, strict=False):
            live.change(slot, BLUE, policy)
            live.step(slots)
        live.restart(slots[0], turn)
        shown(live, (4, slots))
        used.append(sum(array.nbytes for array in jax.live_arrays()))
        for slot in slots:
            live.leave(slot)
    assert compiled() == 0
    assert used[0] == used[1] == used[2]


def test_mistakes_are_told_and_change_nothing(model, live):
    slot = live.join(RED, 1)
    before = shown(live, (5, [slot]))[slot]
    for mistake, says in (
        (lambda: live.join("a dragon", 0), "dragon"),
        (lambda: live.join(RED, -1), "seed"),
        (lambda: live.restart(slot, 2**32), "seed"),
        (lambda: live.change(slot, "a dragon"), "dragon"),
        (lambda: live.change(slot, BLUE, "recache:all"), "renoise:M, recache"),
        (lambda: Live(model, 1, "crossfade:0"), "crossfade:K"),
        (lambda: Live(model, 0), "one stream"),
        (lambda: Live(model.over(placement.Devices()), 1), "share one device"),
    ):
        with pytest.raises(UserError, match=says):
            mistake()
    others = [live.join(RED, seed) for seed in range(3)]
    with pytest.raises(Full, match="All 4 places"):
        live.join(RED, 0)
    live.leave(others[1])
    assert live.join(RED, 0) == others[1]
    with pytest.raises(ValueError, match="before the first"):
        live.warm()
    assert_same(np.concatenate([before, shown(live, (1, [slot]))[slot]]), alone(model, RED, 1, 3))
    live.leave(slot)
    with pytest.raises(ValueError, match="nobody"):
        live.step([slot])
    assert live.step([]) == {}


def test_one_stream_of_frames_takes_prompts_pauses_and_seeds(model):
    """Two clips, whose prompts change after 7 blocks and whose seed does after 10; between them another stream runs."""
    with Stream(model, [RED, BLUE], seed=3) as stream:
        before = [next(stream) for _ in range(7)]
        next(Stream(model, [RED, BLUE], seed=5))
        stream.change([BLUE, BLUE], "recache+crossfade:2")
        after = [next(stream) for _ in range(3)]
        stream.reset(3)
        again = next(stream)
    assert list(stream) == []
    assert [frames.shape[:2] for frames in (*before[:2], again)] == [(2, 9), (2, 12), (2, 9)]
    video = np.concatenate([*before, *after], 1)
    assert_same(video[0], alone(model, RED, 3, 10, [(7, BLUE, "recache+crossfade:2")]))
    assert np.abs(video[0] - alone(model, RED, 3, 10).astype(int))[-36:].mean() > 5
    assert_same(again[0], alone(model, BLUE, 3, 1))


def test_a_stream_is_rolled_out_by_the_config_s_method_unless_it_is_told_another(model):
    settings = config.load(str(TINY))
    settings.method = "self_forcing"
    other = sampler.load(settings)
    by_config, told = Stream(other, [RED], seed=3), Stream(model, [RED], seed=3, method="self_forcing")
    rolling = Stream(other, [RED], seed=3, method="rolling")
    shown = [np.concatenate([next(stream), next(stream)], 1)[0] for stream in (by_config, told, rolling)]
    np.testing.assert_array_equal(shown[0], shown[1])
    assert_same(shown[2], alone(model, RED, 3, 2))
    assert np.abs(shown[0] - shown[2].astype(int)).mean() > 1
    settings.method = "roling"
    with pytest.raises(UserError, match="config.method is 'roling'"):
        sampler.load(settings)


def test_mistakes_told_to_one_stream_change_nothing(model):
    stream = Stream(model, [RED], seed=4)
    before = next(stream)
    for mistake, says in (
        (lambda: Stream(model, ["a dragon"]), "dragon"),
        (lambda: Stream(model, [RED], -1), "seed"),
        (lambda: stream.change(["a dragon"]), "dragon"),
        (lambda: stream.change([BLUE], "slowly"), "'slowly' is no way"),
        (lambda: Stream(model, RED), "a list of prompts"),
        (lambda: Stream(model, []), "a list of prompts"),
        (lambda: stream.change([BLUE, BLUE]), "a list of 1 prompts, one a clip"),
        (lambda: stream.change(BLUE), "a list of 1 prompts, one a clip"),
        (lambda: stream.reset(2**32), "seed"),
        (lambda: stream.reset("x"), "seed"),
    ):
        with pytest.raises(UserError, match=says):
            mistake()
    assert_same(np.concatenate([before, next(stream)], 1)[0], alone(model, RED, 4, 2))
    stream.close()
    for late in (lambda: stream.change([BLUE]), lambda: stream.reset(1)):
        with pytest.raises(UserError, match="closed"):
            late()


def test_an_interrupted_stream_is_closed_and_says_so(model, monkeypatch):
    """A block was lost on the way, so what came after it would not join."""
    stream = Stream(model, [RED], seed=4)
    next(stream)

    def interrupted(frames):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(live_streams, "fetched", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    with pytest.raises(UserError, match="closed"):
        stream.change([BLUE])
    assert list(stream) == []


def test_a_step_takes_over_what_the_streams_carry(live):
    slot = live.join(RED, 1)
    for _ in range(7):
        before = live._shelf
        live.step([slot])
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.state))

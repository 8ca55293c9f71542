"""A new prompt on the way against the literal NumPy version, and what else can be said to a stream."""

import functools
import gc

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny

from rfjax import change, dit, rollout
from rfjax.errors import UserError
from rfjax.rollout import RolloutConfig
from rfjax.stream import Stream, stream_step

CONFIGS = {  # as published: Self Forcing has no sink
    "rolling": RolloutConfig((1000, 750, 500), block_frames=2, sink_blocks=1, ring_blocks=5, span_blocks=5),
    "self_forcing": RolloutConfig((1000, 500), block_frames=1, sink_blocks=0, ring_blocks=4, span_blocks=4),
}
BLOCKS = 12
KEYS = jax.random.split(jax.random.key(0), 1)
NEW = tiny.normal(8, 1, tiny.CONFIG.text_len, tiny.CONFIG.text_dim)  # a prompt


def frame_shape(method):
    return CONFIGS[method].block_frames, *tiny.FRAME


@functools.cache
def noise(method):
    """The stream's noise as an array [block, step, B, f, H, W, C]."""
    grid = jax.vmap(jax.vmap(rollout.position_noise(KEYS, frame_shape(method)), (None, 0)), (0, None))
    return np.asarray(jax.jit(grid)(jnp.arange(BLOCKS), jnp.arange(CONFIGS[method].num_steps)))


@functools.cache
def new_text():
    call = jax.jit(functools.partial(dit.DiT(tiny.CONFIG).apply, method="text_kv"))
    return call({"params": tiny.params()}, jnp.asarray(NEW))


def opened(method, num_blocks=BLOCKS, given=(), key=KEYS):
    model = tiny.model(CONFIGS[method])
    return Stream(model, key, frame_shape(method), method, num_blocks, map(jnp.asarray, given), recall=True)


def turned(method, words, at, given=()):
    """The clip [1, F, H, W, C] whose prompt changes before window `at`."""
    stream, blocks = opened(method, given=given), []
    while stream.state.index < at:
        blocks.append(next(stream))
    assert stream.state.index == at
    stream.change(new_text(), change.parse(words))
    return np.concatenate([*blocks, *stream], 1)


def literal(method, at, act, given=()):
    """The same by NumPy; act(rollout, text before, text after, windows since, what is under way) before each window."""
    roll = naive.Rollout(tiny.naive_dit(), CONFIGS[method], noise(method))
    old, new = roll.dit.text, naive.DiT(tiny.CONFIG, tiny.params(), NEW).text

    def turn(index, window):
        roll.index = index
        if index >= at:
            act(roll, old, new, index - at, window)

    return getattr(roll, method)(BLOCKS, list(given), turn=turn)


def keep(roll, old, new, since, window):
    roll.dit.text = new


def crossfade(roll, old, new, since, window, steps=4):
    share = min(1, (since + 1) / steps)
    roll.dit.text = [
        tuple(a + share * (b - a) for a, b in zip(*layer, strict=True))
        for layer in zip(old, new, strict=True)
    ]


def recache(roll, old, new, since, window, sink=False):
    roll.dit.text = new
    if since:
        return
    c, count = roll.config, len(roll.memory)
    ring = range(max(c.sink_blocks, count - c.ring_blocks), count)
    kept = [*range(min(c.sink_blocks, count)), *ring]
    for block in kept if sink else ring:
        seen = [place for place in naive.clean_past(block, c) if place[1] in kept]
        _, roll.memory[block] = roll.x0([roll.clean[block]], [block], [0], seen)


def renoise(roll, old, new, since, window, most=1):
    roll.dit.text = new
    if since or not window:
        return
    index = roll.index
    anew = sorted(window)[-most:]
    for position in range(anew[0], index):
        if position in window:  # at a clip's end nothing enters
            window[position] = roll.noise[position][0]
        ids = [block for block in sorted(window) if block <= position]
        steps = [position - block if block in anew else index - block for block in ids]
        seen = naive.denoise_past(ids[0], len(ids), roll.config)
        x0, _ = roll.x0([window[block] for block in ids], ids, [roll.t[step] for step in steps], seen)
        for block, step, x in zip(ids, steps, x0, strict=True):
            if block in anew:
                window[block] = roll.renoise(x, block, step + 1)


@pytest.mark.parametrize("at", [3, 9])
@pytest.mark.parametrize(
    "words, act",
    [
        ("keep", keep),
        ("crossfade:4", crossfade),
        ("recache", recache),
        ("recache:sink", functools.partial(recache, sink=True)),
        ("renoise:1", renoise),
        ("renoise:7", functools.partial(renoise, most=7)),
    ],
)
def test_a_new_prompt_agrees_with_numpy(words, act, at):
    ours = turned("rolling", words, at)
    np.testing.assert_allclose(ours, literal("rolling", at, act), atol=1e-4)


@pytest.mark.parametrize("at, most", [(12, 2), (12, 1), (13, 1)])
def test_a_new_prompt_while_the_clip_ends_agrees_with_numpy(at, most):
    """Windows 12 and 13 of 12 blocks: nothing enters any more, blocks 10 and 11, and then 11 alone, are under way."""
    ours = turned("rolling", f"renoise:{most}", at)
    np.testing.assert_allclose(ours, literal("rolling", at, functools.partial(renoise, most=most)), atol=1e-4)


@pytest.mark.parametrize(
    "words, act", [("recache:sink", functools.partial(recache, sink=True)), ("renoise:2", keep)]
)
def test_a_new_prompt_after_given_blocks_agrees_with_numpy(words, act):
    """renoise:2 before the first window, when nothing is under way, keeps all."""
    given, at = tiny.normal(5, 3, 1, *frame_shape("rolling")), 3 if act is keep else 6
    ours = turned("rolling", words, at, given)
    np.testing.assert_allclose(ours, literal("rolling", at, act, given), atol=1e-4)


@pytest.mark.parametrize("words, act", [("recache", recache), ("renoise:1", keep)])
def test_self_forcing_takes_new_prompts_too(words, act):
    ours = turned("self_forcing", words, 7)
    np.testing.assert_allclose(ours, literal("self_forcing", 7, act), atol=1e-4)


def test_what_is_shown_before_a_change_stays():
    plain = np.concatenate(list(opened("rolling")), 1)
    anew = turned("rolling", "renoise:2", 9)
    np.testing.assert_array_equal(anew[:, :14], plain[:, :14])  # 7 blocks were taken
    assert np.abs(anew[:, 14:] - plain[:, 14:]).mean() > 0.1


def test_a_reset_stream_is_a_new_one_under_the_prompt_given_last():
    stream = opened("rolling")
    stream.change(new_text(), change.parse("keep"))
    fresh = [next(stream) for _ in range(3)]
    other = opened("rolling", key=jax.random.split(jax.random.key(1), 1))
    next(other)
    other.change(new_text(), change.parse("crossfade:9"))
    next(other)
    other.reset(KEYS)
    np.testing.assert_array_equal(np.stack([next(other) for _ in range(3)]), np.stack(fresh))


def test_a_closed_stream_ends_and_its_memory_is_free():
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    stream = opened("rolling")
    next(stream)
    assert sum(array.nbytes for array in jax.live_arrays()) > before
    stream.close()
    assert list(stream) == []
    assert sum(array.nbytes for array in jax.live_arrays()) == before
    with pytest.raises(ValueError, match="the stream is closed"):
        stream.change(stream.model.text_kv, change.parse("renoise:2"))


def test_new_prompts_compile_once_and_leave_nothing_behind():
    stream, used = opened("rolling", num_blocks=rollout.ENDLESS), []
    old, traces = stream.model.text_kv, stream_step._cache_size()
    for turn in range(3):
        for words in ("crossfade:2", "renoise:1+recache"):
            stream.change(old if turn % 2 else new_text(), change.parse(words))
            next(stream)
            next(stream)
            next(stream)
        used.append(sum(array.nbytes for array in jax.live_arrays()))
    assert used[0] == used[1] == used[2]
    assert stream_step._cache_size() <= traces + 1


@pytest.mark.parametrize(
    "words", ["", "renoise", "renoise:-1", "renoise:0", "crossfade:0", "recache:sinks", "keep+", "Keep"]
)
def test_a_word_that_is_no_policy_is_told(words):
    with pytest.raises(UserError, match="is no way to change a prompt; give keep, renoise:M"):
        change.parse(words)


def test_policies_are_combined():
    assert change.parse("renoise:4+recache:sink+crossfade:2") == change.Change(4, True, True, 2)
    assert change.parse("keep") == change.Change()


def test_recaching_needs_the_clean_blocks():
    stream = Stream(tiny.model(CONFIGS["rolling"]), KEYS, frame_shape("rolling"))
    with pytest.raises(ValueError, match="recall=True"):
        stream.change(new_text(), change.parse("recache"))

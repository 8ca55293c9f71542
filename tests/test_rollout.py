"""Rollouts against the literal NumPy version, and a stream's promises: one program, constant memory."""

import functools
import re

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny

from rfjax import attention, rollout
from rfjax.rollout import METHODS, RolloutConfig
from rfjax.stream import Stream, stream_step

CONFIGS = {  # as published: Self Forcing has no sink
    "rolling": RolloutConfig((1000, 750, 500), block_frames=2, sink_blocks=1, ring_blocks=5, span_blocks=5),
    "self_forcing": RolloutConfig((1000, 500), block_frames=1, sink_blocks=0, ring_blocks=4, span_blocks=4),
}
BATCH, BLOCKS = 2, 12
KEYS = jax.random.split(jax.random.key(0), BATCH)
methods = pytest.mark.parametrize("method", list(METHODS))


def test_a_ring_that_cannot_hold_what_is_read_is_told_at_once():
    for wrong in ({"ring_blocks": 5}, {"sink_blocks": -1}):
        with pytest.raises(ValueError, match="cannot hold|must exceed"):
            RolloutConfig(**wrong)


def frame_shape(config):
    return (config.block_frames, *tiny.FRAME)


@functools.cache
def noise(config):
    """The stream's noise as an array [block, step, B, f, H, W, C]."""
    draw = rollout.position_noise(KEYS, frame_shape(config))
    grid = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
    return np.asarray(jax.jit(grid)(jnp.arange(BLOCKS), jnp.arange(config.num_steps)))


@functools.cache
def stream(method, num_blocks):
    """A clip [B, F, H, W, C] of the stream."""
    config = CONFIGS[method]
    blocks = Stream(tiny.model(config, BATCH), KEYS, frame_shape(config), method, num_blocks)
    return np.concatenate([np.asarray(block) for block in blocks], 1)


@methods
@pytest.mark.parametrize("num_blocks", range(1, 11))
def test_every_length_agrees_with_numpy(method, num_blocks):
    config = CONFIGS[method]
    literal = getattr(naive.Rollout(tiny.naive_dit(BATCH), config, noise(config)), method)
    np.testing.assert_allclose(stream(method, num_blocks), literal(num_blocks), atol=1e-4)


@methods
@pytest.mark.parametrize("count, num_blocks", [(1, 2), (1, 9), (2, 12), (7, 12), (9, 12)])
def test_a_clip_that_goes_on_from_given_blocks_agrees_with_numpy(method, count, num_blocks):
    config = CONFIGS[method]
    given = tiny.normal(5, count, BATCH, *frame_shape(config))
    model = tiny.model(config, BATCH)
    blocks = Stream(model, KEYS, frame_shape(config), method, num_blocks, map(jnp.asarray, given))
    ours = np.concatenate([np.asarray(block) for block in blocks], 1)
    literal = naive.Rollout(tiny.naive_dit(BATCH), config, noise(config))
    np.testing.assert_allclose(ours, getattr(literal, method)(num_blocks, list(given)), atol=1e-4)


def test_self_forcing_goes_on_from_its_own_blocks_as_if_nothing_had_happened():
    config, whole = CONFIGS["self_forcing"], stream("self_forcing", BLOCKS)
    given = [jnp.asarray(whole[:, block : block + 1]) for block in range(5)]
    again = Stream(tiny.model(config, BATCH), KEYS, frame_shape(config), "self_forcing", BLOCKS, given)
    np.testing.assert_allclose(np.concatenate(list(again), 1), whole, rtol=0, atol=1e-5)


@methods
def test_a_clip_shorter_than_what_is_given_is_its_beginning(method):
    config = CONFIGS[method]
    given = tiny.normal(5, 4, BATCH, *frame_shape(config))
    blocks = Stream(tiny.model(config, BATCH), KEYS, frame_shape(config), method, 3, given)
    np.testing.assert_array_equal(np.stack(list(blocks)), given[:3])


@methods
def test_scan_on_the_same_noise_is_the_stream(method):
    """Bit for bit when rolling; in Self Forcing the compiler may move what no block changes out of the scan."""
    shape = frame_shape(CONFIGS[method])

    @jax.jit
    def scan(model, keys):
        return rollout.rollout(model, rollout.position_noise(keys, shape), BATCH, BLOCKS, shape, method)

    scanned = scan(tiny.model(CONFIGS[method], BATCH), KEYS)
    atol = {"rolling": 0, "self_forcing": 4e-6}[method]
    np.testing.assert_allclose(scanned, stream(method, BLOCKS), rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnames="method")
def single_step(model, method, key, state, shift):
    """A step of one clip whose noise is that of the block `shift` before."""
    draw = rollout.position_noise(key, frame_shape(CONFIGS[method]))
    return METHODS[method].step(model, lambda b, k: draw(b - shift, k), rollout.ENDLESS, state)


def single(method, clip):
    """The model and key of one clip of the batch."""
    model = tiny.model(CONFIGS[method], BATCH)
    text_kv = jax.tree.map(lambda a: a[:, clip : clip + 1], model.text_kv)
    return model.replace(text_kv=text_kv), KEYS[clip : clip + 1]


@methods
@pytest.mark.parametrize("clip", range(BATCH))
def test_a_batch_is_its_clips(method, clip):
    model, key = single(method, clip)
    state, blocks = METHODS[method].init(model, 1, frame_shape(CONFIGS[method])), []
    for _ in range(8):
        state, block = single_step(model, method, key, state, jnp.int32(0))
        blocks.append(block[0])
    blocks = np.concatenate(blocks[METHODS[method].lead(CONFIGS[method]) :])
    np.testing.assert_allclose(blocks, stream(method, BLOCKS)[clip, : len(blocks)], atol=1e-5)


def moved(state, shift):
    """A steady state as it would be `shift` blocks later: the ring turns, the sink stays."""
    cache, sinks = state.cache, state.cache.config.sink_blocks

    def turn(a, axis):
        sink, ring = jnp.split(a, [sinks], axis)
        return jnp.concatenate([sink, jnp.roll(ring, shift % cache.config.ring_blocks, axis)], axis)

    block = turn(cache.block, 0)
    block = block + jnp.where(jnp.arange(block.size) >= sinks, jnp.int32(shift), 0)
    kv = jax.tree.map(lambda a: turn(a, 2), cache.kv)
    return state.replace(index=state.index + shift, cache=cache.replace(kv=kv, block=block))


@methods
@pytest.mark.parametrize("shift", [100_000, 1_000_003, 100_000_002])
def test_far_along_a_stream_the_numbers_are_those_near_its_start(method, shift):
    model, key = single(method, 0)
    state = METHODS[method].init(model, 1, frame_shape(CONFIGS[method]))
    for _ in range(9):
        state, _ = single_step(model, method, key, state, jnp.int32(0))
    far = moved(state, shift)
    for _ in range(7):
        state, near_block = single_step(model, method, key, state, jnp.int32(0))
        far, far_block = single_step(model, method, key, far, jnp.int32(shift))
        np.testing.assert_array_equal(far_block, near_block)
    assert int(far.index) == int(state.index) + shift


@methods
def test_a_stream_compiles_once_and_its_memory_does_not_grow(method):
    model, used, traces = tiny.model(CONFIGS[method], BATCH), [], stream_step._cache_size()
    for count, block in enumerate(Stream(model, KEYS, frame_shape(CONFIGS[method]), method), start=1):
        del block
        if count in (5, 60):
            used.append(sum(array.nbytes for array in jax.live_arrays()))
        if count == 60:
            break
    list(Stream(model, KEYS[::-1], frame_shape(CONFIGS[method]), method, 3))
    assert used[0] == used[1]
    assert stream_step._cache_size() <= traces + 1


def test_a_step_takes_over_the_buffers_of_the_state():
    model, config = tiny.model(CONFIGS["rolling"], BATCH), CONFIGS["rolling"]
    before = rollout.rolling_init(model, BATCH, frame_shape(config))
    stream_step(model, "rolling", KEYS, rollout.ENDLESS, before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim)


@methods
def test_a_step_writes_its_cache_in_place(method):
    """Nowhere in the compiled program, in none of its branches, is the cache copied; it is updated by slices alone."""
    model = tiny.model(CONFIGS[method], BATCH)
    state = METHODS[method].init(model, BATCH, frame_shape(CONFIGS[method]))
    shape = ",".join(map(str, state.cache.kv.k.shape))
    text = stream_step.lower(model, method, KEYS, rollout.ENDLESS, state).compile().as_text()
    made = set(re.findall(rf"= f32\[{shape}\]\S* ([\w-]+)\(", text))
    assert "dynamic-update-slice" in made
    assert made <= {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice", "fusion"}


def test_in_steady_state_nothing_is_masked_and_no_key_is_wasted(monkeypatch):
    """Window and clean call look at the frames of the span, not one more, in the program itself."""
    model, config, looks = tiny.model(CONFIGS["rolling"], BATCH), CONFIGS["rolling"], set()
    attend = attention.attend

    def watched(q, k, v, mask, *rest):
        looks.add((q.shape[1], k.shape[1], mask is None))
        return attend(q, k, v, mask, *rest)

    monkeypatch.setattr(attention, "attend", watched)

    def step(state):
        window = functools.partial(rollout.window_call, model, state.cache, state.window, steady=True)
        x0 = window(index=state.index, num_blocks=rollout.ENDLESS)
        return rollout.clean_call(model, state.cache, state.index, x0[:, 0], steady=True)

    jax.eval_shape(step, rollout.rolling_init(model, BATCH, frame_shape(config)))
    block = config.block_frames * tiny.FRAME[0] * tiny.FRAME[1] // 4  # tokens, in patches of 2×2
    window, span, text = config.num_steps * block, config.span_blocks * block, tiny.CONFIG.text_len
    assert looks == {(window, span, True), (block, span, True), (window, text, True), (block, text, True)}


def test_noise_depends_on_sample_block_and_step_alone():
    config = CONFIGS["rolling"]
    everything = noise(config)
    draw = rollout.position_noise(KEYS[1:], frame_shape(config))
    np.testing.assert_array_equal(draw(jnp.int32(4), jnp.int32(2))[0], everything[4, 2, 1])
    assert len(np.unique(everything)) > 0.99 * everything.size  # nothing is drawn twice
    assert abs(everything.mean()) < 0.05 and abs(everything.std() - 1) < 0.05


def test_a_window_that_does_not_fit_the_span_is_refused():
    with pytest.raises(ValueError, match="span"):
        RolloutConfig(sink_blocks=3)

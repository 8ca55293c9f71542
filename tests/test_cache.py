"""The cache against its definition, block by block: what stays, what each call sees, and where."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax import attention, cache, dit, rope
from rfjax.cache import CacheConfig
from rfjax.dit import KV, DiTConfig
from rfjax.rollout import RolloutConfig

FRAMES, TOKENS = 2, 3  # frames of a block, tokens of a frame
CONFIGS = [  # (sink, ring, span)
    CacheConfig(1, 7, 7),
    CacheConfig(0, 6, 7),
    CacheConfig(1, 3, 4),
    CacheConfig(2, 4, 5),
    CacheConfig(3, 9, 6),
    CacheConfig(0, 1, 1),
]
ids = [f"sink{c.sink_blocks}-ring{c.ring_blocks}-span{c.span_blocks}" for c in CONFIGS]
configs = pytest.mark.parametrize("config", CONFIGS, ids=ids)
quick = settings(max_examples=25, deadline=None)


def mark(block):
    """Keys and values [L, B, N, A, K] that tell their block, frame and token; values are keys + 0.5."""
    number = 1000 * block + jnp.arange(FRAMES * TOKENS, dtype=jnp.float32)
    k = jnp.broadcast_to(number[None, None, :, None, None], (1, 1, FRAMES * TOKENS, 1, 2))
    return KV(k, k + 0.5)


@functools.partial(jax.jit, static_argnums=0)
def filled(config, count):
    """The cache after blocks 0 … count-1."""
    size = DiTConfig(dim=2, ffn_dim=2, num_heads=1, num_layers=1, text_dim=1, text_len=1)
    empty = cache.init(config, size, 1, FRAMES * TOKENS)
    return jax.lax.fori_loop(0, count, lambda b, c: cache.write(c, b, mark(b.astype(jnp.float32))), empty)


denoise_masked = jax.jit(lambda state, first, size: cache.read_denoise(state, first, size, FRAMES, False))
denoise_steady = jax.jit(
    lambda state, first, size: cache.read_denoise(state, first, size, FRAMES, True), static_argnums=2
)
clean = jax.jit(cache.read_clean, static_argnums=(2, 3))


def seen(past):
    """[(position, block, frame)] of a read, valid frames in order; every token must tell the same."""
    k, v = (np.asarray(a).reshape(-1, TOKENS, 2) for a in dit.seen(past.kv, past.slots))
    valid = np.ones(len(k), bool) if past.valid is None else np.asarray(past.valid)
    frames = []
    for position, tokens, values, ok in zip(np.asarray(past.positions), k, v, valid, strict=True):
        if ok:
            np.testing.assert_array_equal(values, tokens + 0.5)
            block, frame = divmod(int(tokens[0, 0]), 1000)
            expected = 1000 * block + frame + np.arange(TOKENS)
            np.testing.assert_array_equal(tokens, np.stack([expected, expected], -1))
            frames.append((int(position), block, frame // TOKENS))
    return frames


def rules(config):
    """The same sizes for the naive version."""
    steps = (1000,)
    return RolloutConfig(steps, 5.0, FRAMES, config.sink_blocks, config.ring_blocks, config.span_blocks)


@configs
@quick
@given(data=st.data())
def test_slots_hold_the_sink_and_the_newest_blocks(config, data):
    count = data.draw(st.integers(0, 60))
    state = filled(config, count)
    sinks = [b for b in range(count) if b < config.sink_blocks]
    newest = [b for b in range(count) if b >= config.sink_blocks][-config.ring_blocks :]
    held = np.asarray(state.block)
    assert sorted(held[held >= 0]) == sinks + newest
    for slot, block in enumerate(held):
        expected = mark(int(block)).k[0, 0] if block >= 0 else np.zeros((FRAMES * TOKENS, 1, 2))
        np.testing.assert_array_equal(state.kv.k[0, 0, slot], expected)


@configs
@quick
@given(data=st.data())
def test_denoising_sees_what_the_definition_says(config, data):
    first = data.draw(st.integers(0, 60))
    size = data.draw(st.integers(1, config.span_blocks - config.sink_blocks))
    state, expected = filled(config, first), naive.denoise_past(first, size, rules(config))
    assert seen(denoise_masked(state, first, size)) == expected
    if first >= config.span_blocks:
        assert seen(denoise_steady(state, first, size)) == expected


@configs
@quick
@given(data=st.data())
def test_the_clean_call_sees_what_the_definition_says(config, data):
    block = data.draw(st.integers(0, 60))
    state, expected = filled(config, block), naive.clean_past(block, rules(config))
    assert seen(clean(state, block, FRAMES, False)) == expected
    if block >= config.span_blocks - 1:
        assert seen(clean(state, block, FRAMES, True)) == expected


def test_nothing_is_seen_twice_or_beyond_the_span():
    config = CONFIGS[0]
    for first in range(20):
        for size in range(1, 6):
            frames = naive.denoise_past(first, size, rules(config))
            positions = [position for position, _, _ in frames]
            assert positions == sorted(set(positions)) and all(p < first * FRAMES for p in positions)
            assert len(frames) + size * FRAMES <= config.span_blocks * FRAMES


ATTENTION = DiTConfig(dim=24, ffn_dim=2, num_heads=2, num_layers=1, text_dim=1, text_len=1)


@jax.jit
def cached_attention(q, k, v, first):
    """Attention of a block `first` with queries q over what a window of 2 sees of the blocks k, v before it."""
    state = cache.init(CacheConfig(1, 3, 4), ATTENTION, 1, FRAMES * TOKENS)
    state = jax.lax.fori_loop(
        0, first, lambda b, state: cache.write(state, b, KV(k[b][None, None], v[b][None, None])), state
    )
    past = cache.read_denoise(state, first, 2, FRAMES, steady=False)
    before = rope.rotation(past.positions - first * FRAMES, 1, TOKENS, ATTENTION.head_dim)
    own = rope.rotation(jnp.arange(FRAMES), 1, TOKENS, ATTENTION.head_dim)
    mask = past.valid[None]
    k, v = (a[0] for a in dit.seen(past.kv, past.slots))
    return attention.attend(rope.apply(q, own), rope.apply(k, before), v, mask)


@pytest.mark.parametrize("first", [1, 3, 30])
def test_cached_attention_is_attention_over_the_same_frames(first):
    """Keys written block by block, read, rotated and attended to, against the frames listed by hand."""
    k, v = tiny.normal(0, 2, 30, FRAMES * TOKENS, ATTENTION.num_heads, ATTENTION.head_dim)
    q = tiny.normal(1, 1, *k.shape[1:])
    ours = cached_attention(q, k, v, first)

    def frame(array, block, index):
        return array[block, index * TOKENS : (index + 1) * TOKENS].swapaxes(0, 1)

    listed = naive.denoise_past(first, 2, rules(CacheConfig(1, 3, 4)))
    keys = [naive.rotate_frame(frame(k, b, j), position, TOKENS) for position, b, j in listed]
    values = np.concatenate([frame(v, b, j) for _, b, j in listed], 1)
    for j in range(FRAMES):
        query = naive.rotate_frame(frame(q, 0, j), first * FRAMES + j, TOKENS)
        expected = naive.attention(query, np.concatenate(keys, 1), values).swapaxes(0, 1)
        np.testing.assert_allclose(ours[0, j * TOKENS : (j + 1) * TOKENS], expected, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(7, 7, 7), (-1, 7, 7), (1, 4, 7)], ids=["all sink", "negative", "short ring"]
)
def test_impossible_memories_are_refused(sizes):
    with pytest.raises(ValueError):
        CacheConfig(*sizes)

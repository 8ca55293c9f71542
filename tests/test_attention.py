"""Attention against a loop over queries, and masks against the rules written out."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rfjax import attention


def by_loop(q, k, v, mask):
    """One query of one head of one sample at a time, over the keys it may see."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, n, a in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[n])
        scores = np.array([q[b, n, a] @ k[b, m, a] for m in seen]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, n, a] = weights / weights.sum() @ v[b, seen, a]
    return out


@pytest.mark.parametrize(
    "cached_scores, most_scores",  # all at once; one head at a time; its queries by 2 (5 is odd); one by one
    [(2**26, 2**26), (2 * 5 * 7, 2**26), (1, 2 * 7 * 2), (2**26, 1)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_a_loop(masked, cached_scores, most_scores, monkeypatch):
    monkeypatch.setattr(attention, "CACHED_SCORES", cached_scores)
    monkeypatch.setattr(attention, "MOST_SCORES", most_scores)
    q, (k, v) = tiny.normal(0, 2, 5, 3, 8), tiny.normal(1, 2, 2, 7, 3, 8)
    mask = np.random.default_rng(2).random((5, 7)) < 0.5 if masked else np.ones((5, 7), bool)
    mask[:, 0] = True
    ours = attention.attend(*map(jnp.asarray, (q, k, v)), jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(ours, by_loop(q, k, v, mask), atol=1e-5)


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = (jnp.asarray(tiny.normal(seed, 1, 4, 1, 2)) for seed in range(3))
    out = attention.attend(q, k, v, jnp.zeros((4, 4), bool))
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


def test_large_scores_do_not_overflow():
    q = jnp.full((1, 2, 1, 4), 1e4)
    assert np.isfinite(attention.attend(q, q, q)).all()


def test_bfloat16_values_come_back_in_bfloat16():
    q = jnp.asarray(tiny.normal(3, 1, 3, 2, 4))
    half = attention.attend(*(a.astype(jnp.bfloat16) for a in (q, q, q)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), attention.attend(q, q, q), atol=0.05)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_of_a_frame_share_its_row(rows):
    q, (k, v) = tiny.normal(0, 2, 12, 2, 8), tiny.normal(1, 2, 2, 20, 2, 8)
    frames = np.random.default_rng(4).random((rows, 5)) < 0.5
    frames[:, 0] = True
    mask = np.array([[frames[i // 4 % rows, j // 4] for j in range(20)] for i in range(12)])
    for form in (jnp.asarray(frames), attention.FrameMask(frames)):
        ours = attention.attend(*map(jnp.asarray, (q, k, v)), form)
        np.testing.assert_allclose(ours, by_loop(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("frames, block", [(1, 1), (6, 3), (9, 3), (4, 1)])
def test_block_causal_rule(frames, block):
    mask = attention.block_causal_mask(frames, block)
    for query, key in np.ndindex(frames, frames):
        assert mask[query, key] == (key // block <= query // block)


@pytest.mark.parametrize("frames, block", [(2, 1), (6, 3), (8, 2)])
def test_teacher_forcing_rule(frames, block):
    mask = attention.teacher_forcing_mask(frames, block)
    assert mask.shape == (2 * frames, 2 * frames)
    for query, key in np.ndindex(mask.shape):
        query_noisy, key_noisy = query >= frames, key >= frames
        query_block, key_block = query % frames // block, key % frames // block
        if not query_noisy:
            sees = not key_noisy and key_block <= query_block
        else:
            sees = key_block == query_block if key_noisy else key_block < query_block
        assert mask[query, key] == sees

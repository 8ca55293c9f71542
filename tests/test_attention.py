"""Attention against a loop over queries, and masks against the rules written out."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rfjax import attention, axes
from rfjax.errors import UserError


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


HERE = [name for name, where in attention.BACKENDS.items() if jax.default_backend() in where]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_every_backend_of_this_platform_agrees_at_odd_lengths(backend, rows):
    """Against a loop in float64: within float32's error, cuDNN's within bfloat16's, which is all that it takes."""
    dtype = jnp.bfloat16 if backend == "cudnn" else jnp.float32
    q, (k, v) = tiny.normal(0, 1, 21, 2, 16), tiny.normal(1, 2, 1, 35, 2, 16)
    q, k, v = (np.asarray(jnp.asarray(a, dtype), np.float32) for a in (q, k, v))
    frames = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]], bool)[:rows]
    mask = None if rows is None else attention.FrameMask(frames) if rows > 1 else jnp.asarray(frames)
    seen = np.ones((21, 35), bool) if rows is None else frames.repeat(21 // rows, 0).repeat(7, 1)
    ours = attention.attend(*(jnp.asarray(a, dtype) for a in (q, k, v)), mask, backend)
    np.testing.assert_allclose(ours, by_loop(q, k, v, seen), atol=0.03 if backend == "cudnn" else 1e-5)


def test_cudnn_is_asked_to_leave_out_keys_at_the_end(monkeypatch):
    """Frames that count go first and the rest is cut off by length, as its kernel can; here by JAX's plain version of the same."""
    asked, plain = [], jax.nn.dot_product_attention

    def kernel(*args, implementation, **options):
        asked.append(implementation)
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, (k, v) = tiny.normal(0, 2, 9, 3, 8), tiny.normal(1, 2, 2, 20, 3, 8)
    for frames in (None, np.array([[0, 1, 0, 1, 1]], bool), np.ones((1, 5), bool)):
        mask = np.ones((9, 20), bool) if frames is None else frames.repeat(9, 0).repeat(4, 1)
        given = None if frames is None else jnp.asarray(frames)
        ours = attention.attend(*map(jnp.asarray, (q, k, v)), given, "cudnn")
        np.testing.assert_allclose(ours, by_loop(q, k, v, mask), atol=1e-5)
    unseen = attention.attend(*map(jnp.asarray, (q, k, v)), jnp.zeros((1, 5), bool), "cudnn")
    assert np.isfinite(unseen).all() and np.abs(unseen).max() <= np.abs(v).max()
    several = jnp.asarray(np.tri(3, 5, 2, dtype=bool))  # not the same for all: plain products
    attention.attend(*map(jnp.asarray, (q, k, v)), several, "cudnn")
    assert asked == ["cudnn"] * 4


def test_cudnn_is_told_how_many_queries_each_of_several_streams_has(monkeypatch):
    """A constant would be of one stream, and JAX's rule for several refuses that."""
    told = []

    def kernel(q, k, v, *, query_seq_lengths, key_value_seq_lengths, **_):
        told.append([isinstance(x, jax.core.Tracer) for x in (query_seq_lengths, key_value_seq_lengths)])
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, masks = jnp.asarray(tiny.normal(0, 2, 1, 6, 2, 8)), jnp.array([[[True, False]], [[True, True]]])
    jax.vmap(lambda q, mask: attention.attend(q, q, q, mask, "cudnn"))(q, masks)
    assert told == [[True, True]]


def test_a_gpu_takes_cudnn_where_it_can(monkeypatch):
    monkeypatch.setattr(axes, "platform", lambda: "gpu")
    asked = []
    monkeypatch.setattr(attention, "_cudnn", lambda q, k, v, mask: asked.append((q.shape, mask)) or q)
    chips = {"7.5": False, "8.0": True, "gfx90a": False, "12.0": True}
    for capability, flash in chips.items():
        chip = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(attention.jax, "devices", lambda chip=chip: [chip])
        assert attention._from_ampere() == flash
    half, full = (jnp.asarray(tiny.normal(0, 1, 3, 2, 8), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    attention.attend(half, half, half)
    assert asked == [(half.shape, None)]
    attention.attend(full, full, full)
    attention.attend(half[..., :4], half[..., :4], half[..., :4])  # heads of 4 it does not take
    attention.attend(half, half, half, backend="xla")
    assert len(asked) == 1


def test_a_backend_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(axes, "platform", lambda: "gpu")
    attention.check("cudnn", "bfloat16", 128)
    with pytest.raises(UserError, match="no splash attention on GPU; --attention takes auto, xla, cudnn"):
        attention.check("splash", "bfloat16", 128)
    for dtype, size in (("float32", 128), ("bfloat16", 12), ("bfloat16", 256)):
        with pytest.raises(UserError, match=f"cuDNN's attention takes bfloat16 .* not {dtype} and {size}"):
            attention.check("cudnn", dtype, size)
        attention.check("auto", dtype, size)


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

"""The transformer against a literal NumPy version, and its promises: relative positions, remat, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny

from rfjax import attention, dit
from rfjax.dit import KV, DiT, DiTConfig, Past

BATCH, FRAMES, SEEN = 2, 4, 3
TIMES = np.float32([0, 555.5556, 1000, 300])


@functools.cache
def inputs():
    """x, t, and random keys and values of SEEN past frames."""
    x = tiny.normal(1, BATCH, FRAMES, *tiny.FRAME)
    t = np.broadcast_to(TIMES, (BATCH, FRAMES))
    tokens = tiny.FRAME[0] * tiny.FRAME[1] // 4
    shape = (tiny.CONFIG.num_layers, BATCH, SEEN * tokens, tiny.CONFIG.num_heads, tiny.CONFIG.head_dim)
    return x, t, KV(tiny.normal(2, *shape), tiny.normal(3, *shape))


@functools.cache
def call(config=tiny.CONFIG):
    return jax.jit(lambda params, *args: DiT(config).apply({"params": params}, *args))


def ours(positions, past=None, mask=None, config=tiny.CONFIG):
    x, t, _ = inputs()
    text_kv = tiny.text_kv(tiny.CONFIG, BATCH)
    return call(config)(tiny.params(), x, t, text_kv, np.asarray(positions, np.int32), past, mask)


def naive_past(kv, positions):
    """Past keys [L, B, P·T, A, K] as the naive version's list of frames."""
    k, v = (np.asarray(a, np.float64).reshape(a.shape[0], BATCH, SEEN, -1, *a.shape[3:]) for a in kv)
    frames = []
    for frame, position in enumerate(positions):
        layers = [(k[i, :, frame].swapaxes(1, 2), v[i, :, frame].swapaxes(1, 2)) for i in range(len(k))]
        frames.append((position, layers))
    return frames


def assert_agrees(
    result, frames, past=(), positions=range(FRAMES), sees=lambda query, key: True, base=10000.0
):
    x, _, _ = inputs()
    config = dataclasses.replace(tiny.CONFIG, rope_base=base)
    network = naive.DiT(config, tiny.params(), tiny.context(BATCH))
    flows, stored = network([x[:, i] for i in range(frames)], TIMES, positions, past, sees)
    flow, kv = result
    np.testing.assert_allclose(flow, np.stack(flows, 1), atol=2e-5)
    for part in (0, 1):
        expected = np.stack(
            [np.concatenate([layers[i][part] for layers in stored], 2) for i in range(tiny.CONFIG.num_layers)]
        )
        np.testing.assert_allclose(kv[part], expected.swapaxes(2, 3), atol=2e-5)


def past_of(kv, positions, valid=None):
    """A past of one frame a slot, the slots in another order than they are seen."""
    order = np.argsort([2, 0, 1])
    slots = KV(*(a.reshape(*a.shape[:2], SEEN, -1, *a.shape[3:])[:, :, [2, 0, 1]] for a in kv))
    return Past(slots, order, np.int32(positions), None if valid is None else np.asarray(valid))


def test_bidirectional_agrees_with_numpy():
    assert_agrees(ours(range(FRAMES)), FRAMES)


def test_block_causal_agrees_with_numpy():
    mask = attention.block_causal_mask(FRAMES, 2)
    assert_agrees(ours(range(FRAMES), None, mask), FRAMES, sees=lambda query, key: key // 2 <= query // 2)


@pytest.mark.parametrize("valid", [None, [True, False, True]])
def test_past_agrees_with_numpy(valid):
    _, _, kv = inputs()
    positions, own = [5, 6, 9], [10, 11, 12, 13]
    past = past_of(kv, positions, valid)
    seen = [frame for frame, ok in zip(naive_past(kv, positions), valid or [True] * SEEN, strict=True) if ok]
    assert_agrees(ours(own, past), FRAMES, seen, own)


@pytest.mark.parametrize("changes", [{"rope_base": 100.0}, {"unroll": True}], ids=str)
def test_another_base_of_the_rotations_and_unrolled_layers_agree_with_numpy(changes):
    _, _, kv = inputs()
    positions, own, config = [5, 6, 9], [10, 11, 12, 13], dataclasses.replace(tiny.CONFIG, **changes)
    result = ours(own, past_of(kv, positions), config=config)
    assert_agrees(result, FRAMES, naive_past(kv, positions), own, base=config.rope_base)


@pytest.mark.parametrize("shift", [100_000, 1_000_000])
def test_only_differences_of_positions_matter_bit_for_bit(shift):
    _, _, kv = inputs()
    near, far = (
        ours(np.arange(10, 14) + s, past_of(kv, np.int32([5, 6, 9]) + np.int32(s))) for s in (0, shift)
    )
    jax.tree.map(np.testing.assert_array_equal, near, far)


def test_remat_changes_no_gradient():
    x, t, _ = inputs()

    def gradient(config):
        def loss(params):
            net = DiT(config)
            text_kv = net.apply({"params": params}, jnp.asarray(tiny.context(BATCH)), method="text_kv")
            return (net.apply({"params": params}, x, t, text_kv, jnp.arange(FRAMES))[0] ** 2).mean()

        return jax.jit(jax.grad(loss))(tiny.params())

    plain, remat = (gradient(dataclasses.replace(tiny.CONFIG, remat=remat)) for remat in (False, True))
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


def test_bfloat16_stays_near_float32():
    x, t, _ = inputs()
    half = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    text_kv = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny.text_kv(tiny.CONFIG, BATCH))
    flow, kv = call(half)(tiny.params(), x, t, text_kv, jnp.arange(FRAMES))
    exact, _ = ours(range(FRAMES))
    assert flow.dtype == jnp.float32 and kv.k.dtype == jnp.bfloat16
    assert np.abs(flow - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    "wrong", [dict(num_heads=5), dict(num_heads=8), dict(patch_size=(2, 2, 2))], ids=["split", "odd", "patch"]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        DiTConfig(**(dataclasses.asdict(tiny.CONFIG) | wrong))


def test_timestep_embedding_is_cosines_then_sines():
    t = np.float32([[0, 952.381, 3]])
    angles = t[..., None] * 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    np.testing.assert_allclose(dit.timestep_embedding(jnp.asarray(t), 8), expected, atol=1e-4)


def test_naive_frames_are_the_package_frames():
    frame = tiny.normal(0, 1, *tiny.FRAME)
    net = naive.DiT(tiny.CONFIG, tiny.params(), tiny.context(1))
    tokens, rows, columns = net.patches(frame)
    assert tokens.shape == (1, 6, 12) and (rows, columns) == (2, 3)
    np.testing.assert_array_equal(net.unpatch(tokens, rows, columns), frame)

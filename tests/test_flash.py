"""The TPU kernel, interpreted on CPU, against attention in the open: values, gradients, masks, padding, several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rfjax import attention, axes, flash

FRAMES = np.array([[1, 0, 1, 0, 0, 1, 0], [0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks each way at sizes that the interpreter bears; 30 tokens a frame do not fill whole ones."""
    monkeypatch.setattr(flash, "LARGEST", 128)


def arrays(frames=3, past=4, tokens=60, heads=2, batch=1):
    queries, keys = frames * tokens, (frames + past) * tokens
    return [
        jnp.asarray(tiny.normal(seed, batch, length, heads, 8))
        for seed, length in ((0, queries), (1, keys), (2, keys))
    ]


@pytest.mark.parametrize(
    "mask",
    [None, FRAMES[:1], FRAMES[2:], flash.FrameMask(FRAMES)],
    ids=["none", "some keys", "all keys", "static"],
)
def test_kernel_agrees_with_plain_products(mask):
    q, k, v = arrays()
    weight = jnp.asarray(tiny.normal(3, *q.shape))

    def compared(attend):
        return lambda q, k, v, mask: (jnp.sin(attend(q, k, v, mask)) * weight).sum()

    def both(attend):
        return jax.jit(jax.value_and_grad(compared(attend), argnums=(0, 1, 2)))(q, k, v, mask)

    plain = both(lambda q, k, v, mask: attention.attend(q * q.shape[-1] ** 0.5, k, v, mask))
    kernel = both(functools.partial(flash.flash, interpret=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), kernel, plain)


def test_lengths_are_padded_least():
    for length, size in [(5, 128), (128, 128), (129, 128), (512, 128)]:
        assert flash.block_size(length) == size


def test_real_lengths_waste_a_tenth_at_most(monkeypatch):
    monkeypatch.undo()
    for frames in (3, 15, 21, 27, 54):
        length = 1560 * frames
        size = flash.block_size(length)
        assert size % 128 == 0 and 512 <= size <= 1024 and -length % size <= length / 10


def test_static_mask_is_asked_block_by_block():
    """The kernel's question for any block, against the whole matrix of tokens."""
    mask = flash.FrameMask(FRAMES, (4, 5), (14, 40))
    whole = FRAMES.repeat(4, 0).repeat(5, 1)
    whole = np.pad(whole, ((0, 2), (0, 5)), mode="edge")
    for rows, columns in [((0, 14), (0, 40)), ((3, 9), (7, 21)), ((12, 14), (34, 40))]:
        block = mask[slice(*rows), slice(*columns)]
        assert (block == whole[slice(*rows), slice(*columns)]).all()


def test_static_mask_is_one_value():
    same, other = flash.FrameMask(FRAMES.copy()), flash.FrameMask(~FRAMES)
    assert flash.FrameMask(FRAMES) == same != other and hash(same) == hash(flash.FrameMask(FRAMES))
    assert jax.tree.leaves(same) == [] and jax.checkpoint(lambda mask: mask)(same) == same


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = arrays()
    out = flash.flash(q, k, v, jnp.zeros((1, 7), bool), interpret=True)
    assert np.isfinite(out).all() and np.abs(out).max() <= np.abs(v).max()


def test_the_platform_is_that_of_the_mesh(monkeypatch):
    """A program traced for chips that are not here takes their kernel, one traced for nothing in particular this machine's."""
    asked = []
    monkeypatch.setattr(flash, "flash", lambda q, k, v, mask: asked.append(q.shape) or q)
    q, k, v = arrays()
    attention.attend(q, k, v)
    assert asked == []
    monkeypatch.setattr(axes, "platform", lambda: "tpu")
    attention.attend(q, k, v)
    assert asked == [q.shape]

"""Rotations against complex multiplication, one token at a time."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny

from rfjax import rope

HEIGHT, WIDTH = 2, 3


@jax.jit
def turned(x, positions):
    return rope.apply(x, rope.rotation(positions, HEIGHT, WIDTH, x.shape[-1]))


def turn(x, positions):
    """x [B, tokens, A, K] of frames at `positions`."""
    return np.asarray(turned(x, np.int32(positions)))


@pytest.mark.parametrize("head_dim", [2, 8, 12, 16, 128])
def test_agrees_with_complex_rotation(head_dim):
    positions = [0, 1, 7, -4]
    x = tiny.normal(0, 2, len(positions) * HEIGHT * WIDTH, 3, head_dim)
    frames = x.astype(np.float64).reshape(2, len(positions), HEIGHT * WIDTH, 3, head_dim)
    expected = [
        naive.rotate_frame(frames[:, i].swapaxes(1, 2), position, WIDTH).swapaxes(1, 2)
        for i, position in enumerate(positions)
    ]
    np.testing.assert_allclose(turn(x, positions), np.concatenate(expected, 1), atol=1e-5)


@pytest.mark.parametrize("head_dim", [12, 16, 64, 128])
def test_parts_of_a_head(head_dim):
    sizes = rope.axis_sizes(head_dim)
    assert sum(sizes) == head_dim and sizes[1] == sizes[2] == 2 * (head_dim // 6)
    assert all(size % 2 == 0 for size in sizes)


def test_scores_depend_on_differences_alone():
    q, k = tiny.normal(1, 2, 1, HEIGHT * WIDTH, 1, 12)
    near, far = (
        np.einsum("bnak,bmak->banm", turn(q, [3 + shift]), turn(k, [1 + shift])) for shift in (0, 40)
    )
    np.testing.assert_allclose(near, far, atol=1e-4)


def test_a_stream_at_frame_zero_is_not_turned_in_time():
    x = tiny.normal(2, 1, HEIGHT * WIDTH, 1, 12)
    np.testing.assert_allclose(turn(x, [0])[..., :4], x[..., :4])


def test_keeps_dtype_and_length():
    x = tiny.normal(3, 1, HEIGHT * WIDTH, 2, 12)
    np.testing.assert_allclose(np.linalg.norm(turn(x, [9]), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    assert turn(jnp.bfloat16(x), [9]).dtype == jnp.bfloat16

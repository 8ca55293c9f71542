"""The noise schedule against the public implementation's numbers and against closed forms."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax import flow

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedule.npz")


def test_table_is_the_public_one():
    np.testing.assert_allclose(flow.training_sigmas(5.0), GOLDEN["sigmas"], atol=1e-6)
    np.testing.assert_allclose(flow.loss_weights(5.0), GOLDEN["training_weights"], atol=1e-4)


def test_noising_is_the_public_one():
    table = 1000 * flow.training_sigmas(5.0)
    t = table[np.abs(GOLDEN["query"][:, None] - table).argmin(1)]
    np.testing.assert_allclose(flow.add_noise(GOLDEN["x"], GOLDEN["noise"], t), GOLDEN["noised"], atol=1e-5)


def test_few_step_list_is_warped():
    expected = [1000, 952.381, 882.353, 769.231, 555.556]
    np.testing.assert_allclose(flow.few_step_timesteps((1000, 800, 600, 400, 200), 5.0), expected, atol=1e-3)
    np.testing.assert_allclose(flow.few_step_timesteps((1000, 500), 1.0), [1000, 500])


@given(st.floats(0, 1), st.floats(1, 20))
def test_shift_is_undone_by_its_inverse(sigma, shift):
    np.testing.assert_allclose(flow.shift_sigma(flow.shift_sigma(sigma, shift), 1 / shift), sigma, atol=1e-9)


def test_shift_keeps_the_ends_and_raises_the_middle():
    sigma = np.linspace(0, 1, 11)
    shifted = flow.shift_sigma(sigma, 5.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (np.diff(shifted) > 0).all()
    assert (shifted[1:-1] > sigma[1:-1]).all()


def test_loss_weights_are_a_bump_of_mean_one():
    sigma = np.array([5 * i / 1000 / (1 + 4 * i / 1000) for i in range(1000, 0, -1)])
    bump = np.exp(-2 * ((1000 * sigma - 500) / 1000) ** 2)
    bump -= bump.min()
    np.testing.assert_allclose(flow.loss_weights(5.0), bump / bump.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [(2,), (2, 5)])
def test_noise_flow_and_x0_agree_whatever_axes_t_has(axes):
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 2, 5, 4, 4, 3)).astype(np.float32)
    t = rng.uniform(1, 1000, axes).astype(np.float32)
    x_t, v = flow.add_noise(x0, noise, t), jnp.asarray(noise - x0)
    np.testing.assert_allclose(flow.x0_from_flow(x_t, v, t), x0, atol=1e-5)
    sigma = t.reshape(axes + (1,) * (5 - len(axes))) / 1000
    np.testing.assert_allclose(x_t, x0 + sigma * v, atol=1e-5)
    np.testing.assert_allclose(sigma * flow.flow_from_x0(x_t, x0, t), sigma * v, atol=1e-5)


def test_clean_and_pure_noise_are_the_ends():
    x0, noise = np.ones((1, 2), np.float32), np.full((1, 2), 3, np.float32)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, np.float32([0])), x0)
    np.testing.assert_array_equal(flow.add_noise(x0, noise, np.float32([1000])), noise)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=4, max_size=4))
def test_random_timesteps_are_shifted_and_clamped(uniform):
    ours = flow.random_timesteps(jnp.float32(uniform), 5.0, 20, 980)
    sigma = np.floor(np.float32(uniform) * 1000) / 1000
    expected = np.clip(1000 * 5 * sigma / (1 + 4 * sigma), 20, 980)
    np.testing.assert_allclose(ours, expected, atol=1e-2)

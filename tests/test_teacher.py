"""The teacher's guidance against two calls, its sampler against the exact solution of a Gaussian's flow."""

import jax
import numpy as np
import pytest
import tiny

from rfjax import dit, flow, teacher
from rfjax.errors import UserError

STD = 0.4  # of the data; its mean is the caption's
SHIFT, GUIDANCE = 5.0, 2.0


class Gaussian:
    """The exact flow E[ε - x0 | x] of data N(m, STD²), m the mean of the caption."""

    def apply(self, variables, x, t=None, text_kv=None, positions=None, past=None, mask=None, method=None):
        if method == "text_kv":
            return x.mean((1, 2))
        sigma = (t / 1000)[:, :, None, None, None]
        return gaussian_flow(x, sigma, text_kv[:, None, None, None, None]), None


def gaussian_flow(x, sigma, mean):
    excess = (x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    return sigma * excess - (mean + (1 - sigma) * STD**2 * excess)


def exact(noise, sigma, mean):
    """Where the flow brings ε: quantiles go to quantiles. Guidance moves the mean."""
    return (1 - sigma) * mean + np.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2) * noise


NOISE, CONTEXT = tiny.normal(0, 2, 3, 2, 2, 1), tiny.normal(1, 2, 3, 4)
MEAN = (1 + GUIDANCE) * CONTEXT.mean((1, 2)).reshape(2, 1, 1, 1, 1).astype(np.float64)


def trajectory(num_steps):
    negative = np.zeros_like(CONTEXT)
    return teacher.ode_trajectory(Gaussian(), {}, NOISE, CONTEXT, negative, GUIDANCE, num_steps, SHIFT)


def euler(num_steps):
    x = np.asarray(NOISE, np.float64)
    levels = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in np.linspace(1, 0, num_steps + 1)]
    for here, there in zip(levels, levels[1:], strict=False):
        x = x + (there - here) * gaussian_flow(x, here, MEAN)
    return x


def test_trajectory_follows_the_exact_one_at_every_level():
    path = trajectory(60)
    assert path.shape == (61, *NOISE.shape)
    np.testing.assert_array_equal(path[0], NOISE)
    sigmas = teacher.solver_sigmas(60, SHIFT).astype(np.float64)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    wanted = np.stack([exact(NOISE, sigma, MEAN) for sigma in sigmas])
    np.testing.assert_allclose(path, wanted, atol=0.02)


def test_sampler_is_of_second_order_and_euler_is_not():
    wanted = exact(NOISE, 0.0, MEAN)
    errors = {n: np.abs(np.asarray(trajectory(n)[-1], np.float64) - wanted).max() for n in (40, 80, 160)}
    eulers = {n: np.abs(euler(n) - wanted).max() for n in (40, 80, 160)}
    for n in (40, 80):
        assert errors[n] / errors[2 * n] > 3.5
        assert 1.6 < eulers[n] / eulers[2 * n] < 2.6
    assert errors[40] < eulers[40] / 4


def test_guidance_is_two_calls_apart():
    network, params = dit.DiT(tiny.CONFIG), tiny.params()
    x, t = tiny.normal(2, 2, 2, *tiny.FRAME), np.float32([700, 30])
    context, negative = tiny.context(2), np.zeros_like(tiny.context(2))
    alone = jax.jit(lambda context: teacher.predict_flow(network, params, x, t, context))
    together = jax.jit(lambda: teacher.guided_flow(network, params, x, t, context, negative, 3.0))
    cond, uncond = alone(context), alone(negative)
    assert np.abs(cond - uncond).max() > 1e-2
    np.testing.assert_allclose(together(), cond + 3 * (cond - uncond), atol=1e-5)


@pytest.mark.parametrize("num_steps", [5, 15, 50])
def test_few_step_levels_lie_on_the_sampler_grid(num_steps):
    steps = (1000, 800, 600, 400, 200)
    places = teacher.few_step_indices(steps, num_steps)
    levels = 1000 * teacher.solver_sigmas(num_steps, SHIFT)[places]
    np.testing.assert_allclose(levels, flow.few_step_timesteps(steps, SHIFT), rtol=1e-6)


def test_sampler_that_misses_the_few_step_levels_is_refused():
    with pytest.raises(
        UserError, match=r"12 steps does not pass through .*\[1000, 800\].*another number of steps"
    ):
        teacher.few_step_indices((1000, 800), 12)

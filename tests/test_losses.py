"""Objectives against formulas in NumPy, on a network of one line, or on the naive transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rfjax import attention, dit, losses, teacher

normal = tiny.normal
CLIP = (2, 4, 2, 3, 5)  # B, F, H, W, C
CONTEXT = normal(9, 2, 3, 7)


class Linear:
    """flow = a·x + t/1000 + b·mean(text): a network whose loss is quickly written down."""

    def apply(self, variables, x, t=None, text_kv=None, positions=None, past=None, mask=None, method=None):
        if method == "text_kv":
            return x.mean((1, 2))
        p = variables["params"]
        np.testing.assert_array_equal(positions, np.arange(CLIP[1]))
        return p["a"] * x + t[:, :, None, None, None] / 1000 + p["b"] * text_kv[
            :, None, None, None, None
        ], None


def linear_flow(params, x, t, context):
    text = np.asarray(context, np.float64).mean((1, 2)).reshape(2, 1, 1, 1, 1)
    return params["a"] * x + t / 1000 + params["b"] * text


def noised(x0, noise, t):
    return (1 - t / 1000) * x0 + t / 1000 * noise


def spread(t):
    """t [B] or [B, F], over a clip."""
    return np.asarray(t, np.float64).reshape(t.shape + (1,) * (5 - t.ndim))


PARAMS = {"a": np.float32(0.7), "b": np.float32(-1.3)}
X, NOISE = normal(0, *CLIP), normal(1, *CLIP)
LEVELS = {"clip": np.float32([900, 150]), "frame": np.float32([[10, 20, 400, 999], [1000, 0, 30, 77]])}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weighted", [False, True])
def test_diffusion_loss_is_its_formula(level, weighted):
    t = LEVELS[level]
    weight = np.float32(t / t.mean()) if weighted else None
    error = linear_flow(PARAMS, noised(X, NOISE, spread(t)), spread(t), CONTEXT) - (NOISE - X)
    wanted = (error**2 * (spread(weight) if weighted else 1)).mean()
    got = losses.diffusion_loss(Linear(), PARAMS, X, CONTEXT, t, NOISE, weight)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_losses_are_float32_whatever_the_network_gives():
    assert losses.mean_square(jnp.full((4, 1000), 300.0, jnp.bfloat16)) == pytest.approx(90000, 1e-6)
    assert losses.mean_square(jnp.full((2, 2), 0.1, jnp.bfloat16), jnp.ones(2)).dtype == jnp.float32


def test_draws_from_the_table_have_the_closed_form():
    sigma = np.array([5 * i / 1000 / (1 + 4 * i / 1000) for i in range(1000, 0, -1)])
    index = np.array([0, 1, 500, 998, 999])
    t = losses.table_draw(jnp.asarray((np.arange(1000) + 0.5) / 1000, jnp.float32), 5.0)
    np.testing.assert_allclose(t, 1000 * sigma, rtol=1e-6)
    edges = jnp.asarray(index / 1000 + 1e-6, jnp.float32)
    np.testing.assert_array_equal(losses.table_draw(edges, 5.0), np.asarray(t)[index])


BLOCK = 1  # frame a block in the causal forms, which the naive network walks through one by one
CAUSAL = (1, 3, *tiny.FRAME)
CAUSAL_X, CAUSAL_NOISE = normal(2, *CAUSAL), normal(3, *CAUSAL)
CAUSAL_T = np.float32([[850, 40, 500]])


def naive_flow(clean, noisy, t):
    """Flow of the last block alone behind its clean past: [clean block 0, …, noisy block], in order."""
    frames = [*(clean[:, i] for i in range(clean.shape[1])), noisy]
    levels, places = [0.0] * clean.shape[1] + [t], range(len(frames))
    return tiny.naive_dit()(frames, levels, places, sees=lambda query, key: key <= query)[0][-1]


def test_teacher_forcing_is_every_block_behind_its_clean_past():
    x_t = noised(CAUSAL_X, CAUSAL_NOISE, spread(CAUSAL_T))
    wanted = [naive_flow(CAUSAL_X[:, :b], x_t[:, b], CAUSAL_T[0, b]) for b in range(3)]
    network, params, context = dit.DiT(tiny.CONFIG), tiny.params(), tiny.context(1)

    @jax.jit
    def both(params):
        mask = attention.teacher_forcing_mask(3, BLOCK)
        arguments = (network, params, CAUSAL_X, context, CAUSAL_T, CAUSAL_NOISE, BLOCK)
        x_t = losses.flow.add_noise(CAUSAL_X, CAUSAL_NOISE, CAUSAL_T)
        out = losses.teacher_forcing_flow(network, params, CAUSAL_X, x_t, CAUSAL_T, context, mask)
        return out, losses.teacher_forcing_loss(*arguments)

    out, loss = both(params)
    np.testing.assert_allclose(out, np.stack(wanted, 1), atol=3e-5)
    error = np.stack(wanted, 1) - (CAUSAL_NOISE - CAUSAL_X)
    np.testing.assert_allclose(loss, (error**2).mean(), rtol=1e-4)


def test_ode_loss_is_the_error_of_x0_under_the_block_causal_mask():
    network, params, context = dit.DiT(tiny.CONFIG), tiny.params(), tiny.context(1)
    frames = [CAUSAL_X[:, i] for i in range(3)]
    flows, _ = tiny.naive_dit()(frames, CAUSAL_T[0], range(3), sees=lambda query, key: key <= query)
    x0 = CAUSAL_X - CAUSAL_T.reshape(1, 3, 1, 1, 1) / 1000 * np.stack(flows, 1)
    wanted = ((x0 - CAUSAL_NOISE) ** 2).mean()
    loss = jax.jit(lambda p: losses.ode_loss(network, p, CAUSAL_X, CAUSAL_T, CAUSAL_NOISE, context, BLOCK))
    np.testing.assert_allclose(loss(params), wanted, rtol=1e-4)


def test_scores_are_x0_of_their_flows():
    t, negative = LEVELS["clip"], np.zeros_like(CONTEXT)
    x_t = noised(X, NOISE, spread(t))
    cond, uncond = (linear_flow(PARAMS, x_t, spread(t), text) for text in (CONTEXT, negative))
    wanted = x_t - spread(t) / 1000 * cond
    guided = x_t - spread(t) / 1000 * (cond + 3 * (cond - uncond))
    x_t = np.float32(x_t)
    np.testing.assert_allclose(losses.score_x0(Linear(), PARAMS, x_t, t, CONTEXT), wanted, atol=1e-5)
    got = losses.guided_x0(Linear(), PARAMS, x_t, t, CONTEXT, negative, 3.0)
    np.testing.assert_allclose(got, guided, atol=1e-5)


def test_dmd_gradient_is_normalised_by_each_sample_and_never_nan():
    x, fake, real = (normal(seed, 3, *CLIP[1:]) for seed in (4, 5, 6))
    real[1] *= 100
    fake[2] = real[2] = x[2]  # nothing to learn, nothing to divide by
    got = losses.dmd_gradient(*(jnp.asarray(a) for a in (x, fake, real)))
    for sample in (0, 1):
        wanted = (fake[sample] - real[sample]) / np.abs(x[sample] - real[sample]).mean()
        np.testing.assert_allclose(got[sample], wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got[2], 0)


@pytest.mark.parametrize("mask", [None, [False, True, True, True]])
def test_gradient_of_the_dmd_loss_is_g_over_the_number_of_scored_elements(mask):
    g = normal(7, *CLIP)
    kept = np.ones(CLIP[1], bool) if mask is None else np.array(mask)
    frame_mask = None if mask is None else jnp.asarray(mask)
    loss, slope = jax.value_and_grad(losses.dmd_loss)(jnp.asarray(X), jnp.asarray(g), frame_mask)
    np.testing.assert_allclose(loss, 0.5 * (g[:, kept].astype(np.float64) ** 2).mean(), rtol=1e-5)
    wanted = g * kept.reshape(1, -1, 1, 1, 1) / g[:, kept].size
    np.testing.assert_allclose(slope, wanted, atol=1e-7)


@pytest.mark.parametrize("mask", [None, [False, True, True, True]])
def test_sid_loss_is_its_formula_and_its_gradient_goes_through_both_scores(mask):
    kept = np.ones(CLIP[1], bool) if mask is None else np.array(mask)
    x = np.float64(X)

    def formula(x, scale):
        fake, real = 0.5 * x + 0.1, 0.8 * x**2
        return ((real - fake) * (fake - x) / scale)[:, kept].mean()

    scale = np.abs(x - 0.8 * x**2).mean((1, 2, 3, 4), keepdims=True)

    def loss(x):
        return losses.sid_loss(x, 0.5 * x + 0.1, 0.8 * x**2, None if mask is None else jnp.asarray(mask))

    value, slope = jax.value_and_grad(loss)(jnp.float32(x))
    np.testing.assert_allclose(value, formula(x, scale), rtol=1e-4)
    for place in ((0, 1, 0, 0, 0), (1, 3, 1, 1, 1), (0, 0, 1, 0, 0)):
        step = np.zeros_like(x)
        step[place] = 1e-4
        wanted = (formula(x + step, scale) - formula(x - step, scale)) / 2e-4
        np.testing.assert_allclose(slope[place], wanted, rtol=1e-3, atol=1e-7)


def test_critic_learns_the_flow_of_clips_that_are_constants_to_it():
    t = LEVELS["clip"]
    error = linear_flow(PARAMS, noised(X, NOISE, spread(t)), spread(t), CONTEXT) - (NOISE - X)

    def loss(params, x):
        return losses.critic_loss(Linear(), params, x, CONTEXT, t, NOISE)

    value, (slope, moved) = jax.value_and_grad(loss, (0, 1))(PARAMS, jnp.asarray(X))
    np.testing.assert_allclose(value, (error**2).mean(), rtol=1e-5)
    wanted = 2 * (error * noised(X, NOISE, spread(t))).mean()  # of (a·x_t + …)² in a
    np.testing.assert_allclose(slope["a"], wanted, rtol=1e-4)
    np.testing.assert_array_equal(moved, 0)


def test_predicted_flow_takes_one_level_a_clip_or_a_frame():
    t = LEVELS["clip"]
    once = teacher.predict_flow(Linear(), PARAMS, X, t, CONTEXT)
    every = teacher.predict_flow(Linear(), PARAMS, X, np.repeat(t[:, None], CLIP[1], 1), CONTEXT)
    np.testing.assert_array_equal(once, every)
    np.testing.assert_allclose(once, linear_flow(PARAMS, X, spread(t), CONTEXT), atol=1e-5)

"""Standard errors and the bootstrap, against closed forms."""

import numpy as np
import pytest

from rfjax.statistics import bootstrap_means, bootstrap_ratio, crossed_error, mean_error

RNG = np.random.default_rng(0)
SEED_EFFECT, PROMPT_EFFECT = RNG.normal(size=(4, 1)), RNG.normal(size=(1, 40))
SCORES = 9 + SEED_EFFECT + PROMPT_EFFECT  # [seeds, prompts]


def test_mean_and_error():
    mean, error = mean_error([[1.0, 2.0, 3.0, np.nan], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(mean, [2, 5])
    np.testing.assert_allclose(error, [1 / np.sqrt(3), 0])
    assert np.isnan(mean_error([np.nan])[0])


def test_error_of_crossed_effects():
    """Of an additive table, the mean's variance is that of seeds / S + that of prompts / P."""
    mean, error = crossed_error(SCORES)
    variance = np.var(SEED_EFFECT, ddof=1) / 4 + np.var(PROMPT_EFFECT, ddof=1) / 40
    np.testing.assert_allclose([mean, error**2], [SCORES.mean(), variance])
    np.testing.assert_allclose(crossed_error(SCORES[:1])[1], SCORES[0].std(ddof=1) / np.sqrt(40))
    np.testing.assert_allclose(crossed_error(SCORES[:, :1])[1], SEED_EFFECT.std(ddof=1) / np.sqrt(4))
    assert np.isnan(crossed_error([[1.0]])[1])


def test_resampled_means_have_the_variance_of_crossed_effects():
    """Of an additive table, the mean's variance is var(seeds) / S + var(prompts) / P, with the unbiased variances."""
    means = bootstrap_means(SCORES[None], 40_000, 0)[:, 0]
    wanted = SEED_EFFECT.var(ddof=1) / 4 + PROMPT_EFFECT.var(ddof=1) / 40
    assert means.mean() == pytest.approx(SCORES.mean(), abs=0.02)
    assert means.var() == pytest.approx(wanted, rel=0.03)


def test_a_ratio_to_a_constant_has_the_quantiles_of_the_mean():
    """Over many prompts the mean is normal: 95 % lie within 1.96 standard deviations."""
    scores = 3 + np.random.default_rng(1).normal(size=(1, 400))
    found = bootstrap_ratio(scores, np.full((1, 400), 2.0))
    error = scores.std() / np.sqrt(400)
    assert found.value == pytest.approx(scores.mean() / 2)
    np.testing.assert_allclose(
        [found.low, found.high], scores.mean() / 2 + error / 2 * np.array([-1.96, 1.96]), atol=0.005
    )
    assert found.below == 0


def test_pairing_takes_out_what_both_methods_share():
    """Twice as much in every prompt and seed is a ratio of 2 without any doubt, however the prompts differ."""
    assert bootstrap_ratio(2 * SCORES, SCORES) == pytest.approx((2, 2, 2, 0))
    assert bootstrap_ratio(SCORES, 2 * SCORES).below == 1
    shuffled = bootstrap_ratio(2 * SCORES, SCORES[:, ::-1])
    assert shuffled.low < 1.99 and shuffled.high > 2.01


def test_there_is_no_ratio_to_what_may_be_nothing():
    assert np.isnan(bootstrap_ratio([[1.0, 2.0]], [[0.0, 1.0]])).all()
    assert bootstrap_ratio([[1.0, 2.0]], [[0.0, 1.0]]).text == "–"
    assert bootstrap_ratio([[1.0, 2.0]], [[2.0, 4.0]]).text == "0.50 (0.50 … 0.50)"


def test_the_same_seed_gives_the_same_interval():
    other = SCORES**2
    assert bootstrap_ratio(SCORES, other, 100, seed=3) == bootstrap_ratio(SCORES, other, 100, seed=3)
    assert bootstrap_ratio(SCORES, other, 100, seed=3) != bootstrap_ratio(SCORES, other, 100, seed=4)

"""What can be said of means of few clips: standard errors, and the bootstrap of a ratio."""

from typing import NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """The ratio of two means, its 95 % interval, and the share of resamples in which it is below 1."""

    value: float
    low: float
    high: float
    below: float

    @property
    def text(self) -> str:
        """Like 0.27 (0.19 … 0.35); "–" where it has no interval."""
        return f"{self.value:.2f} ({self.low:.2f} … {self.high:.2f})" if np.isfinite(self.low) else "–"


def mean_error(values):
    """Mean and its standard error over the last axis; NaN are left out: [..., N] → ([...], [...])."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    count = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(-1) / count
        gaps = np.where(known, values - mean[..., None], 0)
        return mean, np.sqrt((gaps**2).sum(-1) / (count - 1) / count)


def crossed_error(scores):
    """Mean of [seeds, prompts] and its standard error √(s²/seeds + p²/prompts); s and p are the standard deviations of the means
    of seeds and of prompts. Of one seed only the prompts' part is known, of one prompt only the seeds'; of one of each it is NaN.
    """
    scores = np.asarray(scores, np.float64)
    errors = [mean_error(scores.mean(axis))[1] for axis in (0, 1)]
    known = [error**2 for error in errors if np.isfinite(error)]
    return float(scores.mean()), float(np.sqrt(sum(known))) if known else np.nan


def bootstrap_means(scores, resamples, seed):
    """Means of M methods under resampling: scores [M, seeds, prompts] → [resamples, M].

    Training seeds and prompts are drawn with replacement, each by itself and the same for all methods (paired): a prompt that is
    hard is so for every method and seed, and a seed that trained badly shows in every prompt (Owen and Eckles 2012). Of n there are
    n - 1 draws, so that the variance is not too small where n is (Rao and Wu 1988); what there is one of always counts.
    """
    scores = np.asarray(scores, np.float64)
    _, seeds, prompts = scores.shape
    rng = np.random.default_rng(seed)

    def shares(n):
        draws = max(1, n - 1)
        return rng.multinomial(draws, np.full(n, 1 / n), resamples) / draws

    return np.einsum("rs,msp,rp->rm", shares(seeds), scores, shares(prompts), optimize=True)


def bootstrap_ratio(scores, others, resamples=10_000, seed=0):
    """Ratio of the mean drift of one method to another's, paired over training seeds × prompts.

    Args:
        scores, others: [seeds, prompts], the same seeds and prompts.

    Returns:
        `Ratio`; its interval is between the 2.5 % and 97.5 % quantiles. With one seed it says nothing of training. All is NaN where
        resamples of `others` have a mean of 0, as a few prompts without any drift may.
    """
    both = np.stack([scores, others]).astype(np.float64)
    means = bootstrap_means(both, resamples, seed)
    if not np.all(means[:, 1] > 0):
        return Ratio(*4 * [np.nan])
    ratios = means[:, 0] / means[:, 1]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(both[0].mean() / both[1].mean()), float(low), float(high), float((ratios < 1).mean()))

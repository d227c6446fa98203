"""Intervals against SciPy and against all resamples; differences and shares against values computed by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from scir_jax.evaluation.intervals import bootstrap, mean_and_error, paired_difference, share_of_the_way

VALUES = np.array([0.31, -0.12, 0.44, 0.05, 0.27, 0.19, -0.02, 0.38])


def test_means_and_errors():
    mean, error = mean_and_error(VALUES)
    assert mean == pytest.approx(VALUES.mean()) and error == pytest.approx(stats.sem(VALUES))
    assert mean_and_error([0.3]) == (0.3, None)


def test_the_interval_is_that_of_scipy():
    ours = bootstrap(VALUES[:, None], lambda means: means[:, 0])
    theirs = stats.bootstrap((VALUES,), np.mean, method="percentile", n_resamples=40_000, rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert ours == bootstrap(VALUES[:, None], lambda means: means[:, 0]), "the draws are fixed"


def test_the_interval_is_that_of_all_resamples():
    """Four seeds have 256 samples; whole rows are drawn, so that numerator and denominator belong together."""
    rows = np.array([[0.7, 0.5, 0.9], [0.6, 0.45, 0.8], [0.72, 0.52, 0.93], [0.61, 0.5, 0.85]])
    means = np.array([rows[list(drawn)].mean(axis=0) for drawn in itertools.product(range(4), repeat=4)])
    shares = (means[:, 0] - means[:, 1]) / (means[:, 2] - means[:, 1])
    found = share_of_the_way(*rows.T)
    assert found["share"] == pytest.approx((2.63 - 1.97) / (3.48 - 1.97))
    low, high = found["interval"]
    # The ends are quantiles of a step function, of which the draws may hit a neighbouring step.
    assert np.quantile(shares, 0.015) <= low <= np.quantile(shares, 0.035)
    assert np.quantile(shares, 0.965) <= high <= np.quantile(shares, 0.985)


def test_paired_differences():
    ours, theirs = np.array([0.8, 0.7, 0.9]), np.array([0.7, 0.7, 0.6])
    found = paired_difference(ours, theirs)
    assert found["mean"] == pytest.approx(0.4 / 3) and found["error"] == pytest.approx(stats.sem(ours - theirs))
    assert found["wins"] == pytest.approx(2.5 / 3)
    assert found["interval"][0] == pytest.approx(0.0) and found["interval"][1] == pytest.approx(0.3)
    assert paired_difference([0.8], [0.7])["interval"] is None


def test_where_there_is_no_way():
    assert share_of_the_way([0.5, 0.6], [0.5, 0.6], [0.5, 0.6]) is None
    # On one of both seeds there is none: no interval, for a sample may consist of it alone.
    found = share_of_the_way([0.6, 0.6], [0.5, 0.6], [0.7, 0.6])
    assert found["share"] == pytest.approx(0.5) and found["interval"] is None

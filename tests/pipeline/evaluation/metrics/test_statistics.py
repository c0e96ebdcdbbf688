"""Statistics with known answers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from pipeline.evaluation.metrics.alignment import _interval
from pipeline.evaluation.metrics.frechet import Moments, frechet_distance, frechet_extrapolated, moments
from pipeline.evaluation.metrics.statistics import (
    average_precision,
    balanced_accuracy,
    best_threshold,
    nanmean,
    percentiles,
    resample,
    wilson,
)


def test_frechet_distance_of_gaussians_that_commute() -> None:
    a, b = (
        Moments(torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, 4, 9]).double().diag()),
        Moments(torch.tensor([1.0, 0, 3]).double(), torch.tensor([4.0, 4, 1]).double().diag()),
    )
    assert frechet_distance(a, b) == pytest.approx(
        4 + 1 + 0 + 4, abs=1e-12
    )  # |d mu|^2 + sum (sigma_a - sigma_b)^2


@pytest.mark.parametrize("images", [500, 20])  # 20: fewer images than features, a singular covariance
def test_frechet_distance_agrees_with_the_matrix_root(images: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        moments(rng.standard_normal((images, 32)) @ rng.standard_normal((32, 32)) + shift)
        for shift in (0.0, 0.5)
    )
    cross = np.trace(scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())).real
    traces = a.covariance.trace() + b.covariance.trace()
    expected = float((a.mean - b.mean).square().sum() + traces - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9 if images == 500 else 1e-5)
    swapped = frechet_distance(b, a)
    assert swapped == pytest.approx(frechet_distance(a, b), rel=1e-9 if images == 500 else 1e-7)


def test_frechet_distance_of_a_set_to_itself_and_to_one_repeated_image() -> None:
    rows = moments(np.random.default_rng(1).standard_normal((300, 16)).astype(np.float32))
    assert abs(frechet_distance(rows, rows)) < 1e-10 * rows.covariance.trace()
    point = moments(np.full((1, 16), 2.0))
    expected = float((rows.mean - 2).square().sum() + rows.covariance.trace())
    assert frechet_distance(point, rows) == pytest.approx(expected, rel=1e-12)


def test_moments_are_numpys_in_float64() -> None:
    rows = (np.random.default_rng(2).standard_normal((1000, 3)) + 1e4).astype(
        np.float32
    )  # float32 sums would lose the spread
    np.testing.assert_allclose(
        moments(rows).covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9
    )


@pytest.mark.parametrize(
    "scores, labels, expected",
    [
        ([0.9, 0.8, 0.7, 0.1], [1, 1, 0, 0], 1.0),
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.5 * 1 + 0.5 * 2 / 3),  # scikit-learn's own example: 0.83
        ([0.9, 0.8, 0.7], [0, 0, 1], 1 / 3),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 1], 0.5),  # ties count together: the order within them is no merit
        ([1.0, 0.5, 0.5, 0.0], [1, 0, 1, 1], 1 / 3 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 4),
    ],
)
def test_average_precision(scores: list[float], labels: list[int], expected: float) -> None:
    assert average_precision(np.array(scores), np.array(labels)) == pytest.approx(expected)
    assert np.isnan(average_precision(np.array(scores), np.zeros(len(scores))))


def test_balanced_accuracy_and_reweighting() -> None:
    wanted = np.array([[1, 1], [1, 1], [1, 1], [0, 1]])
    decided = np.array([[1, 1], [1, 0], [0, 1], [0, 1]])
    own = balanced_accuracy(decided, wanted)
    assert own[0] == pytest.approx((2 / 3 + 1) / 2) and np.isnan(
        own[1]
    )  # the second attribute is never absent
    weights = np.array([[1, 1, 0, 1], [2, 1, 1, 0]])
    drawn = balanced_accuracy(decided, wanted, weights)
    assert drawn[0, 0] == 1.0 and np.isnan(drawn[1, 0])
    np.testing.assert_allclose(balanced_accuracy(decided, wanted, np.ones((1, 4)))[0], own)


def test_best_threshold_maximises_balanced_accuracy() -> None:
    assert best_threshold(np.array([3.0, 2.0, 1.0, 0.0]), np.array([1, 1, 0, 0])) == 1.5
    assert best_threshold(np.array([1.0, 2.0]), np.array([1, 1])) == 0.0  # one class: nothing to choose
    rng = np.random.default_rng(3)
    labels = rng.random(200) < 0.1
    scores = rng.standard_normal(200) + 2 * labels
    best = balanced_accuracy((scores > best_threshold(scores, labels))[:, None], labels[:, None])[0]
    assert best == max(balanced_accuracy((scores > t - 1e-12)[:, None], labels[:, None])[0] for t in scores)


@pytest.mark.parametrize(
    "k, n, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)  # Newcombe (1998), table I, for 81 of 263
    assert wilson(0, 0) == (0.0, 1.0)


def test_resampling_is_deterministic_and_of_the_right_width() -> None:
    x = np.random.default_rng(4).standard_normal(400)

    def interval(seed: int) -> tuple[float, float]:
        found = percentiles(resample(lambda weights: weights @ x / len(x), len(x), seed))
        assert found is not None
        return found

    low, high = interval(seed=1)
    assert (low, high) == interval(seed=1) != interval(seed=2)
    error = x.std() / len(x) ** 0.5
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_nothing_finite_has_no_interval_and_no_mean() -> None:
    assert percentiles(np.full(10, np.nan)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(nanmean(np.full(3, np.nan)))
    assert nanmean(np.array([1.0, np.nan, 3.0])) == 2.0


def test_extrapolation_needs_subsets_with_a_spread() -> None:
    rows = np.random.default_rng(5).standard_normal((8, 2))
    assert np.isnan(frechet_extrapolated(rows[:7], rows)) and np.isfinite(
        frechet_extrapolated(rows, rows + 1)
    )


def test_the_interval_of_an_average_precision_lies_around_it() -> None:
    """Resampled values are all too high here, so their percentiles would leave the value out."""
    value, drawn = np.array([0.3, 0.5]), np.array([[0.5, 0.6], [0.6, 0.7], [0.7, 0.8], [0.55, 0.65]])
    low, high = _interval(value, drawn) or (0, 0)
    half = 1.959964 * drawn.mean(1).std(ddof=1)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half))
    assert _interval(np.array([0.99]), drawn[:, :1])[1] == 1.0  # it is a share
    assert _interval(value, np.full((4, 2), np.nan)) is None

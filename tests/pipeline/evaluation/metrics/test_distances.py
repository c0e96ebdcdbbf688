"""Distances between sets of features, against closed forms and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.evaluation import vision
from pipeline.evaluation.metrics.distances import kernel_error
from pipeline.evaluation.metrics.frechet import (
    feature_sums,
    frechet_distance,
    frechet_extrapolated,
    frechet_jackknife,
    moments,
)
from pipeline.evaluation.metrics.kernel import kernel_distance
from pipeline.evaluation.metrics.neighbours import manifold, mmd, nearest
from pipeline.evaluation.metrics.statistics import average_precision, weighted_average_precision


def normal(seed: int, n: int, width: int = 8, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, width)) + shift).astype(np.float32)


def test_sums_are_numpys_moments_whatever_the_chunks_and_can_be_taken_away_again():
    x = normal(0, 1000, shift=1000.0)  # far from the origin: squares about 0 would swallow the spread
    whole = feature_sums(x, chunk=77)
    assert np.allclose(whole.moments.mean, x.astype(np.float64).mean(0), rtol=1e-13)
    assert np.allclose(whole.moments.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9, atol=1e-12)
    rest = whole.minus(feature_sums(x[::10], whole.shift)).moments
    kept = np.delete(x, np.arange(0, 1000, 10), 0).astype(np.float64)
    assert np.allclose(rest.mean, kept.mean(0), rtol=1e-12) and np.allclose(
        rest.covariance, np.cov(kept.T), rtol=1e-8
    )


def test_the_jackknife_knows_how_far_the_distance_varies():
    """The standard error has the size of the spread over repetitions."""
    repeated = [frechet_jackknife(normal(2 * i, 500), normal(2 * i + 1, 500, shift=0.5)) for i in range(40)]
    values, errors = np.array(repeated).T
    assert abs(values.mean() - 8 * 0.25) < 0.2
    assert 0.5 < np.median(errors) / values.std() < 2


def test_extrapolation_takes_the_bias_of_few_images_away():
    """Two samples of one distribution: their distance falls as 1/N and is 0 at infinity."""
    pairs = [(normal(2 * i, 400, 32), normal(2 * i + 1, 400, 32)) for i in range(10)]
    plain = np.mean([frechet_distance(moments(a), moments(b)) for a, b in pairs])
    extrapolated = np.mean([frechet_extrapolated(a, b) for a, b in pairs])
    assert plain > 0.5 and abs(extrapolated) < 0.15 * plain


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3


def test_kernel_distance_is_the_unbiased_estimate_with_the_cubic_kernel():
    n, a, b = 300, normal(0, 300), normal(1, 300, shift=0.3)
    mean, deviation = kernel_distance(a, b, subsets=20, subset_size=n)
    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (a, b))
    assert (
        mean == pytest.approx(within - 2 * kernel(a, b).mean(), rel=1e-4) and deviation < 1e-4 * mean
    )  # subsets of all are all
    same = [kernel_distance(normal(2 * i, 300), normal(2 * i + 1, 300), 1, 300)[0] for i in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 40**0.5 < mean


@pytest.mark.parametrize(("size", "subsets"), [(80, 50), (20, 5)])
def test_the_error_of_the_kernel_distance_is_its_spread_over_repetitions(size, subsets):
    n = 200
    values, errors = [], []
    for i in range(25):
        a, b = normal(2 * i, n), normal(2 * i + 1, n, shift=0.5)
        mean, deviation = kernel_distance(a, b, subsets, size)
        values.append(mean)
        errors.append(kernel_error(deviation, subsets, size, n))
    assert 0.6 < np.median(errors) / np.std(values) < 1.7


def test_kernel_distance_is_torch_fidelitys():
    vision.transforms()  # makes torchvision importable
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(0, 300).astype(np.float64), normal(1, 200, shift=0.3).astype(np.float64)
    theirs = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=7, kid_subset_size=50, verbose=False
    )
    assert kernel_distance(a, b, 7, 50) == pytest.approx(tuple(theirs.values()), rel=1e-9)


def distances(samples: torch.Tensor, real: torch.Tensor) -> list[float]:
    frechet = [*frechet_jackknife(samples, real), frechet_extrapolated(samples, real)]
    return [*frechet, *kernel_distance(samples, real, 3, 100), *manifold(samples, real)]


@pytest.mark.gpu
def test_a_gpu_finds_the_hosts_distances():
    a, b = (torch.from_numpy(normal(seed, 400, 64, shift=seed / 2)) for seed in (0, 1))
    assert distances(a.cuda(), b.cuda()) == pytest.approx(distances(a, b), rel=1e-9)


def test_distances_stay_on_the_device_of_the_features(monkeypatch):
    """What a CPU can check: no distance moves its features to another device."""
    a, b = (torch.from_numpy(normal(seed, 60)) for seed in (0, 1))
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(torch.Tensor, name, None)
    assert all(np.isfinite(distances(a, b)))


def test_precision_and_recall_are_torch_fidelitys():
    vision.transforms()  # makes torchvision importable
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = normal(0, 400), normal(1, 500, shift=0.7)
    ours = manifold(a, b)
    theirs = prc_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), prc_neighborhood=3, prc_batch_size=100, verbose=False
    )
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6) and ours.recall == pytest.approx(
        theirs["recall"], abs=1e-6
    )


def test_manifolds_of_equal_disjoint_and_collapsed_sets():
    real = normal(0, 400)
    assert manifold(real, real)[:2] == (1.0, 1.0) and manifold(real, real).coverage == 1.0
    assert manifold(real + 1000, real) == (0.0, 0.0, 0.0, 0.0)
    one = np.repeat(
        real[np.linalg.norm(real, axis=1).argmin()][None], 400, 0
    )  # the most ordinary image over and over
    collapsed = manifold(one, real)
    assert (
        collapsed.precision == 1.0
        and collapsed.recall < 0.05
        and collapsed.coverage < 0.1
        and collapsed.density > 1
    )
    alike = manifold(normal(1, 400), real)
    assert (
        0.6 < alike.precision < 1
        and 0.6 < alike.recall < 1
        and 0.8 < alike.density < 1.2
        and alike.coverage > 0.9
    )


def test_nearest_finds_copies():
    real = normal(0, 3000)
    distance, index = nearest(real[[5, 2900, 17]] + 1e-4, real, 2)
    assert (
        index[:, 0].tolist() == [5, 2900, 17]
        and (distance[:, 0] < 1e-2).all()
        and (distance[:, 1] > 0.1).all()
    )


def test_mmd_tells_equal_from_different_distributions():
    value, p = mmd(normal(0, 200), normal(1, 200, shift=1.0), seed=0)
    assert value > 0.05 and p < 0.01
    ps = [mmd(normal(2 * i, 100), normal(2 * i + 1, 100), seed=i)[1] for i in range(20)]
    assert 0.2 < np.mean(ps) < 0.8


def test_weighted_average_precision_of_copied_rows_is_that_of_the_copies():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 10, 50).astype(float), rng.random(50) < 0.4  # with ties
    weights = rng.multinomial(50, np.full(50, 0.02), size=3)
    expected = [average_precision(np.repeat(scores, w), np.repeat(labels, w)) for w in weights]
    assert weighted_average_precision(scores, labels, weights) == pytest.approx(expected)

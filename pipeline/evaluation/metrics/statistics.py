"""Closed-form statistics, in float64 on the host."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLED_AT_ONCE = 100
SUMMED_AT_ONCE = 1024  # rows
EXTRAPOLATED_FROM = 8  # images: the smallest of the subsets is a quarter of them and needs a spread


class Moments(NamedTuple):
    """Mean [F] and covariance [F, F] of features."""

    mean: np.ndarray
    covariance: np.ndarray


class FeatureSums(NamedTuple):
    """Sums of features about a `shift`, in float64. Sums of a subset can be subtracted again."""

    n: int
    total: np.ndarray  # [F]
    outer: np.ndarray  # [F, F]
    shift: np.ndarray  # [F]; near the mean, so that the squares keep the spread

    def minus(self, part: FeatureSums) -> FeatureSums:
        """Return the sums without those of `part`, which must have the same shift."""
        return FeatureSums(self.n - part.n, self.total - part.total, self.outer - part.outer, self.shift)

    @property
    def moments(self) -> Moments:
        """Mean and unbiased covariance. One row stands for N copies of itself and has no spread."""
        mean = self.total / self.n
        covariance = (self.outer - self.n * np.outer(mean, mean)) / max(1, self.n - 1)
        return Moments(mean + self.shift, covariance)


def feature_sums(
    features: np.ndarray, shift: np.ndarray | None = None, chunk: int = SUMMED_AT_ONCE
) -> FeatureSums:
    """Sum features [N, F] a chunk at a time, which avoids a second copy of all of them in float64."""
    if shift is None:
        shift = features[:chunk].mean(0, dtype=np.float64)
    width = features.shape[1]
    total, outer = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(features), chunk):
        part = features[start : start + chunk].astype(np.float64) - shift
        total += part.sum(0)
        outer += part.T @ part
    return FeatureSums(len(features), total, outer, shift)


def moments(features: np.ndarray) -> Moments:
    """Return mean and covariance of features [N, F].

    One row stands for N copies of itself and has no spread.
    """
    return feature_sums(features).moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), the formula of the FID (arXiv 1706.08500).

    With C_a = L L^T the eigenvalues of C_a C_b are those of the symmetric L^T C_b L, so no matrix
    root is needed.
    """
    try:
        root = np.linalg.cholesky(a.covariance)
    except np.linalg.LinAlgError:  # fewer images than features, or a feature that never fires
        values, vectors = np.linalg.eigh(a.covariance)
        root = vectors * np.sqrt(values.clip(0))
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ b.covariance @ root).clip(0)).sum()
    means = np.square(a.mean - b.mean).sum()
    return float(means + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def frechet_jackknife(a: np.ndarray, b: np.ndarray, groups: int = 10) -> tuple[float, float]:
    """Return the Fréchet distance of features [N, F] and [M, F] and its standard error.

    The jackknife leaves out every `groups`-th image in turn. Row i of `a` and row i of `b` leave
    together, because a sample is drawn for the attributes of its image. The error is nan for fewer
    than two images per group.
    """
    whole_a, whole_b = feature_sums(a), feature_sums(b)
    value = frechet_distance(whole_a.moments, whole_b.moments)
    if min(len(a), len(b)) < 2 * groups:
        return value, math.nan
    left = []
    for group in range(groups):
        rest_a = whole_a.minus(feature_sums(a[group::groups], whole_a.shift))
        rest_b = whole_b.minus(feature_sums(b[group::groups], whole_b.shift))
        left.append(frechet_distance(rest_a.moments, rest_b.moments))
    return value, math.sqrt((groups - 1) * np.var(left))


def frechet_extrapolated(a: np.ndarray, b: np.ndarray, sizes: int = 6) -> float:
    """Return the Fréchet distance for N to infinity (arXiv 1911.07023); nan below 8 images.

    It is the intercept of a line in 1/N through the distances at N/4 ... N. Both sets shrink
    together, which removes the bias of both. Subsets are evenly spread over the rows.
    """
    n = min(len(a), len(b))
    if n < EXTRAPOLATED_FROM:
        return math.nan
    counts = np.unique(np.linspace(n // 4, n, sizes).astype(int))
    distances = []
    for count in counts:
        rows = np.arange(count) * n // count
        distances.append(frechet_distance(moments(a[rows]), moments(b[rows])))
    _, intercept = np.polyfit(1 / counts, distances, 1)
    return float(intercept)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision of scores and labels [N]; nan without a positive.

    It is the sum of (recall gained) * precision over distinct thresholds.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(labels[order].astype(bool))
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # the end of each run of equal scores
    if hits[-1] == 0:
        return math.nan
    gained = np.diff(hits[last], prepend=0)
    return float((gained * hits[last] / (last + 1)).sum() / hits[-1])


def weighted_average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`average_precision` for R reweightings [R, N] of the rows -> [R]; nan without a positive."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    weights = weights[:, order]
    hits = np.cumsum(weights * labels[order].astype(np.float64), 1)[:, last]
    seen = np.cumsum(weights, 1, dtype=np.float64)[:, last]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(seen > 0, hits / seen, 0)
        return (np.diff(hits, axis=1, prepend=0) * precision).sum(1) / hits[:, -1]


def balanced_accuracy(
    decided: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Mean recall of the two classes, for columns of bool [N, A] -> [A]; nan if one is absent.

    With `weights` [R, N] it returns one result for each of R reweightings of the rows -> [R, A].
    """
    weights = np.ones(len(wanted)) if weights is None else weights
    decided, wanted = decided.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        yes = weights @ (decided * wanted) / (weights @ wanted)
        no = weights @ ((1 - decided) * (1 - wanted)) / (weights @ (1 - wanted))
    return (yes + no) / 2


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold on scores [N] with the highest balanced accuracy.

    It lies midway between two scores. It is 0 if a class is absent or all scores are equal.
    """
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order].astype(bool)
    if labels.all() or not labels.any():
        return 0.0
    gain = np.cumsum(labels) / labels.sum() - np.cumsum(~labels) / (~labels).sum()
    splits = np.flatnonzero(np.diff(scores) != 0)
    if not len(splits):
        return 0.0
    best = splits[np.argmax(gain[splits])]
    return float((scores[best] + scores[best + 1]) / 2)


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, shrink = successes / n, 1 + z * z / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)


def resample(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int, resamples: int = 1000
) -> np.ndarray:
    """Evaluate `statistic` on resampled images (bootstrap) -> [resamples, ...].

    `statistic` maps weights [R, n], how often each image was drawn, to [R, ...].
    """
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(0, resamples, RESAMPLED_AT_ONCE):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLED_AT_ONCE)
        parts.append(statistic(weights))
    return np.concatenate(parts)[:resamples]


def percentiles(resampled: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of [R] resampled values, or None if none is finite."""
    if not np.isfinite(resampled).any():
        return None
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def nanmean(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean that leaves nan out; nan without a warning if nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(x, axis)


def finite(x: float) -> float | None:
    """Return `x`, or None if it is not finite: JSON knows no NaN."""
    return float(x) if math.isfinite(x) else None

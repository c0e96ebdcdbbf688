"""Closed-form statistics, in float64 on the host."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np

RESAMPLED_AT_ONCE = 100


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


def standard_deviation(x: np.ndarray) -> float:
    """Standard deviation of a sample [N]; nan for fewer than two."""
    return float(x.std(ddof=1)) if len(x) > 1 else math.nan


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

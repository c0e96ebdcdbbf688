"""Closed-form statistics, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Mean [F] and covariance [F, F] of features."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Of features [N, F]; one row stands for N copies of itself and has no spread."""
    features = features.astype(np.float64)
    mean = features.mean(0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / max(1, len(features) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), the FID's formula (arXiv 1706.08500).

    With C_a = L L^T the eigenvalues of C_a C_b are those of the symmetric L^T C_b L: no matrix root is needed.
    """
    try:
        root = np.linalg.cholesky(a.covariance)
    except np.linalg.LinAlgError:  # fewer images than features, or a feature that never fires
        values, vectors = np.linalg.eigh(a.covariance)
        root = vectors * np.sqrt(values.clip(0))
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ b.covariance @ root).clip(0)).sum()
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Sum over distinct thresholds of (recall gained) * precision, scores and labels [N]; nan without a positive."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(labels[order].astype(bool))
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # the end of each run of equal scores
    if hits[-1] == 0:
        return math.nan
    return float((np.diff(hits[last], prepend=0) * hits[last] / (last + 1)).sum() / hits[-1])


def balanced_accuracy(decided: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean of the two classes' recalls for every column of bool [N, A] -> [A]; nan where a class is absent.

    With `weights` [R, N], one result for each of R reweightings of the rows -> [R, A].
    """
    weights = np.ones(len(wanted)) if weights is None else weights
    decided, wanted = decided.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        yes = weights @ (decided * wanted) / (weights @ wanted)
        no = weights @ ((1 - decided) * (1 - wanted)) / (weights @ (1 - wanted))
    return (yes + no) / 2


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold on scores [N] with the highest balanced accuracy, midway between two scores; 0 where a class is absent."""
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
    """Wilson's 95 % interval of a proportion; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, shrink = successes / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile interval over resampled images. `statistic`: weights [R, n], how often each image was drawn -> [R]."""
    rng = np.random.default_rng(seed)
    parts = [statistic(rng.multinomial(n, np.full(n, 1 / n), size=100)) for _ in range(-(-resamples // 100))]
    low, high = np.nanquantile(np.concatenate(parts)[:resamples], [0.025, 0.975])
    return float(low), float(high)

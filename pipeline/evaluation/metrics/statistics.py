"""Closed-form statistics, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.runtime.split import ceil_div


class Moments(NamedTuple):
    """Mean [F] and covariance [F, F] of features."""

    mean: np.ndarray
    covariance: np.ndarray


class Sums(NamedTuple):
    """Streaming sums of features about a `shift`, in float64: what is added up can be added to others, or taken away again."""

    n: int
    total: np.ndarray  # [F]
    outer: np.ndarray  # [F, F]
    shift: np.ndarray  # [F]; near the mean, so that squares do not swallow the spread

    def minus(self, part: Sums) -> Sums:
        """These features without those of `part`, which were summed about the same shift."""
        return Sums(self.n - part.n, self.total - part.total, self.outer - part.outer, self.shift)

    @property
    def moments(self) -> Moments:
        """Mean and unbiased covariance; one row stands for N copies of itself and has no spread."""
        mean = self.total / self.n
        return Moments(mean + self.shift, (self.outer - self.n * np.outer(mean, mean)) / max(1, self.n - 1))


def sums(features: np.ndarray, shift: np.ndarray | None = None, chunk: int = 1024) -> Sums:
    """Of features [N, F], a chunk at a time: never a second copy of them all in float64."""
    shift = features[:chunk].mean(0, dtype=np.float64) if shift is None else shift
    width = features.shape[1]
    total, outer = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(features), chunk):
        part = features[start : start + chunk].astype(np.float64) - shift
        total += part.sum(0)
        outer += part.T @ part
    return Sums(len(features), total, outer, shift)


def moments(features: np.ndarray) -> Moments:
    """Of features [N, F]; one row stands for N copies of itself and has no spread."""
    return sums(features).moments


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
    return float(
        np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    )


def frechet_jackknife(a: np.ndarray, b: np.ndarray, groups: int = 10) -> tuple[float, float]:
    """Frechet distance of features [N, F] and [M, F] and its standard error, by leaving out every `groups`-th image in turn.

    Row i of `a` and of `b` leave together: a sample was asked for the attributes of its image.
    """
    whole = [sums(rows) for rows in (a, b)]
    value = frechet_distance(whole[0].moments, whole[1].moments)
    if min(len(a), len(b)) < 2 * groups:
        return value, math.nan
    left = []
    for g in range(groups):
        rest = [
            part.minus(sums(rows[g::groups], part.shift)).moments
            for part, rows in zip(whole, (a, b), strict=True)
        ]
        left.append(frechet_distance(*rest))
    return value, math.sqrt((groups - 1) * np.var(left))


def frechet_extrapolated(a: np.ndarray, b: np.ndarray, sizes: int = 6) -> float:
    """Frechet distance for N to infinity: the intercept of a line in 1/N through distances at N/4 ... N (arXiv 1911.07023).

    Both sets shrink together, so the bias of both is taken away. Subsets are evenly spread over the rows.
    """
    n = min(len(a), len(b))
    counts = np.unique(np.linspace(max(2, n // 4), n, sizes).astype(int))
    rows = [np.arange(count) * n // count for count in counts]
    distances = [frechet_distance(moments(a[chosen]), moments(b[chosen])) for chosen in rows]
    return float(np.polyfit(1 / counts, distances, 1)[1]) if len(counts) > 1 else math.nan


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Sum over distinct thresholds of (recall gained) * precision, scores and labels [N]; nan without a positive."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(labels[order].astype(bool))
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # the end of each run of equal scores
    if hits[-1] == 0:
        return math.nan
    return float((np.diff(hits[last], prepend=0) * hits[last] / (last + 1)).sum() / hits[-1])


def weighted_average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`average_precision` of scores and labels [N] for each of R reweightings [R, N] of the rows -> [R]; nan without a positive."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    weights = weights[:, order]
    hits = np.cumsum(weights * labels[order].astype(np.float64), 1)[:, last]
    seen = np.cumsum(weights, 1, dtype=np.float64)[:, last]
    with np.errstate(invalid="ignore", divide="ignore"):
        gained = np.diff(hits, axis=1, prepend=0) * np.where(seen > 0, hits / seen, 0)
        return gained.sum(1) / hits[:, -1]


def balanced_accuracy(
    decided: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
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


def resample(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int, resamples: int = 1000
) -> np.ndarray:
    """`statistic` of resampled images, [resamples, ...]; it is given weights [R, n]: how often each image was drawn."""
    rng = np.random.default_rng(seed)
    chunks = ceil_div(resamples, 100)
    parts = [statistic(rng.multinomial(n, np.full(n, 1 / n), size=100)) for _ in range(chunks)]
    return np.concatenate(parts)[:resamples]


def percentiles(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of [R] resampled values."""
    low, high = (
        np.nanquantile(resampled, [0.025, 0.975]) if np.isfinite(resampled).any() else (math.nan, math.nan)
    )
    return float(low), float(high)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval over resampled images. `statistic`: weights [R, n], how often each image was drawn -> [R]."""
    return percentiles(resample(statistic, n, seed, resamples))

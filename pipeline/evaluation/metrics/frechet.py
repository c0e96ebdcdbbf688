"""The Fréchet distance between sets of features, in float64 on the device where the features are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Rows = np.ndarray | Tensor  # features [N, F]; an array counts as a tensor on the CPU
SUMMED_AT_ONCE = 1024  # rows
EXTRAPOLATED_FROM = 8  # images: the smallest of the subsets is a quarter of them and needs a spread


class Moments(NamedTuple):
    """Mean [F] and covariance [F, F] of features, float64."""

    mean: Tensor
    covariance: Tensor


class FeatureSums(NamedTuple):
    """Sums of features about a `shift`, in float64. Sums of a subset can be subtracted again."""

    n: int
    total: Tensor  # [F]
    outer: Tensor  # [F, F]
    shift: Tensor  # [F]; near the mean, so that the squares keep the spread

    def minus(self, part: FeatureSums) -> FeatureSums:
        """Return the sums without those of `part`, which must have the same shift."""
        return FeatureSums(self.n - part.n, self.total - part.total, self.outer - part.outer, self.shift)

    @property
    def moments(self) -> Moments:
        """Mean and unbiased covariance. One row stands for N copies of itself and has no spread."""
        mean = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / max(1, self.n - 1)
        return Moments(mean + self.shift, covariance)


def feature_sums(features: Rows, shift: Tensor | None = None, chunk: int = SUMMED_AT_ONCE) -> FeatureSums:
    """Sum features [N, F] a chunk at a time, which avoids a second copy of all of them in float64."""
    features = torch.as_tensor(features)
    if shift is None:
        shift = features[:chunk].double().mean(0)
    total, outer = torch.zeros_like(shift), torch.outer(shift, shift).zero_()
    for part in features.split(chunk):
        centred = part.double() - shift
        total += centred.sum(0)
        outer.addmm_(centred.T, centred)
    return FeatureSums(len(features), total, outer, shift)


def moments(features: Rows) -> Moments:
    """Return mean and covariance of features [N, F].

    One row stands for N copies of itself and has no spread.
    """
    return feature_sums(features).moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), the formula of the FID (arXiv 1706.08500).

    With C_a = L L^T the eigenvalues of C_a C_b are those of the symmetric L^T C_b L, so no matrix
    root is needed.
    """
    root, failed = torch.linalg.cholesky_ex(a.covariance)
    if failed:  # fewer images than features, or a feature that never fires
        values, vectors = torch.linalg.eigh(a.covariance)
        root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return float(means + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def frechet_jackknife(a: Rows, b: Rows, groups: int = 10) -> tuple[float, float]:
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


def frechet_extrapolated(a: Rows, b: Rows, sizes: int = 6) -> float:
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

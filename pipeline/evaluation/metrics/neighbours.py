"""Distances between features of single images: coverage of a set, and copies of images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.metrics.frechet import Rows

CHUNK = 2048  # rows of a distance matrix at a time


class Manifold(NamedTuple):
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797)."""

    precision: float
    recall: float
    density: float
    coverage: float


def nearest(a: Rows, b: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest rows of `b` [M, F] for each row of `a` [N, F].

    Returns their distances, ascending, and their indices, both [N, k].
    """
    distances, indices = _nearest(torch.as_tensor(a).double(), torch.as_tensor(b).double(), k)
    return distances.cpu().numpy(), indices.cpu().numpy()


def manifold(samples: Rows, real: Rows, k_precision: int = 3, k_density: int = 5) -> Manifold:
    """Compare samples [N, F] with real images [M, F] in float64, with the published k.

    Precision and recall are torch-fidelity's. All four numbers come from the same three distance
    matrices.
    """
    samples, real = torch.as_tensor(samples).double(), torch.as_tensor(real).double()
    (sample_radius,) = _radii(samples, (k_precision,))
    real_radius, wide_radius = _radii(real, (k_precision, k_density))
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    neighbourhoods = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    recalled, covered = [], []
    for start in range(0, len(real), CHUNK):
        rows = slice(start, start + CHUNK)
        distance = torch.cdist(real[rows], samples)  # [m, N]
        within = distance <= wide_radius[rows, None]
        inside |= (distance <= real_radius[rows, None]).any(0)
        neighbourhoods += within.sum(0)
        recalled.append((distance <= sample_radius).any(1))
        covered.append(within.any(1))
    return Manifold(
        precision=_mean(inside),
        recall=_mean(torch.cat(recalled)),
        density=_mean(neighbourhoods) / k_density,
        coverage=_mean(torch.cat(covered)),
    )


def mmd(a: np.ndarray, b: np.ndarray, seed: int, permutations: int = 200) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy (arXiv 0805.2368) of rows [N, D] and [N, D], N > 1.

    Also returns the p-value: the share of permutations that reach it. The Gaussian kernel is as
    wide as the median distance between rows. The value is nan if all rows are equal.
    """
    n = len(a)
    both = torch.from_numpy(np.concatenate([a, b])).double()
    squared = torch.cdist(both, both).square()
    kernel = torch.exp(-squared / squared[squared > 0].median())
    kernel.fill_diagonal_(0)

    signs = np.ones((permutations + 1, 2 * n))  # row 0: the two sets as they are
    signs[0, n:] = -1
    rng = np.random.default_rng(seed)
    for row in signs[1:]:
        row[rng.permutation(2 * n)[:n]] = -1

    # s^T K s = within - across, and 1^T K 1 = within + across, so each follows.
    s = torch.from_numpy(signs).T
    difference, total = (s * (kernel @ s)).sum(0), kernel.sum()
    within, across = (total + difference) / 2, (total - difference) / 2
    values = within / (n * (n - 1)) - across / (n * n)
    return float(values[0]), _mean(values >= values[0])


def _nearest(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = [torch.cdist(part, b).topk(k, largest=False) for part in a.split(CHUNK)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _radii(rows: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Distance of each row to its k-th nearest other row, for several k.

    A row is its own nearest.
    """
    distances, _ = _nearest(rows, rows, max(ks) + 1)
    return [distances[:, k] for k in ks]


def _mean(x: Tensor) -> float:
    return float(x.double().mean())

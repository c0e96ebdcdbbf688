"""Distances between features of single images: which sets cover which, and whether samples repeat training images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 2048  # rows of a distance matrix at a time


class Manifold(NamedTuple):
    """Precision and recall (arXiv 1904.06991) and density and coverage (arXiv 2002.09797)."""

    precision: float
    recall: float
    density: float
    coverage: float


def nearest(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest distances from each row of `a` [N, F] to rows of `b` [M, F], ascending [N, k], and which rows they are."""
    there = torch.from_numpy(b)
    found = [torch.cdist(part, there).topk(k, largest=False) for part in torch.from_numpy(a).split(CHUNK)]
    return torch.cat([f.values for f in found]).numpy(), torch.cat([f.indices for f in found]).numpy()


def manifold(samples: np.ndarray, real: np.ndarray, k_precision: int = 3, k_density: int = 5) -> Manifold:
    """Of samples [N, F] against real images [M, F], float32; the published k for each pair of numbers.

    Precision and recall equal torch-fidelity's (a test holds it); here all four come from the same three distance matrices.
    """
    fake_radius = _radii(samples, (k_precision,))[0]
    real_radius, wide_radius = _radii(real, (k_precision, k_density))
    inside, within = torch.zeros(len(samples), dtype=torch.bool), torch.zeros(len(samples), dtype=torch.int64)
    recalled, covered = [], []
    there = torch.from_numpy(samples)
    for start, part in zip(range(0, len(real), CHUNK), torch.from_numpy(real).split(CHUNK), strict=True):
        distance = torch.cdist(part, there)  # [m, N]
        own = slice(start, start + len(part))
        inside |= (distance <= real_radius[own, None]).any(0)
        within += (distance <= wide_radius[own, None]).sum(0)
        recalled.append((distance <= fake_radius).any(1))
        covered.append((distance <= wide_radius[own, None]).any(1))
    share = [float(x.double().mean()) for x in (inside, torch.cat(recalled), within, torch.cat(covered))]
    return Manifold(share[0], share[1], share[2] / k_density, share[3])


def _radii(rows: np.ndarray, ks: tuple[int, ...]) -> list[Tensor]:
    """Distance of each row to its k-th nearest other row, for several k; the row itself is its own nearest."""
    distances = torch.from_numpy(nearest(rows, rows, max(ks) + 1)[0])
    return [distances[:, k] for k in ks]


def mmd(a: np.ndarray, b: np.ndarray, seed: int, permutations: int = 200) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy of rows [N, D] and [N, D], and the share of permutations that reach it (p-value).

    Gaussian kernel, its width the median distance within both (arXiv 0805.2368).
    """
    n = len(a)
    both = torch.from_numpy(np.concatenate([a, b])).double()
    squared = torch.cdist(both, both).square()
    kernel = torch.exp(-squared / squared[squared > 0].median())
    kernel.fill_diagonal_(0)
    rng = np.random.default_rng(seed)
    signs = np.ones((permutations + 1, 2 * n))
    signs[0, n:] = -1
    for row in signs[1:]:
        row[rng.permutation(2 * n)[:n]] = -1
    s = torch.from_numpy(signs).T
    # s^T K s = within - across for both halves; with within + across = 1^T K 1 each follows.
    difference, total = (s * (kernel @ s)).sum(0), kernel.sum()
    within, across = (total + difference) / 2, (total - difference) / 2
    values = within / (n * (n - 1)) - across / (n * n)
    return float(values[0]), float((values >= values[0]).double().mean())

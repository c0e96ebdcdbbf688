"""The kernel inception distance between sets of features, in float64 on the features' device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.metrics.frechet import Rows

SUBSETS_SEED = 2020  # torch-fidelity's, so that both draw the same subsets


def kernel_distance(a: Rows, b: Rows, subsets: int, subset_size: int) -> tuple[float, float]:
    """Return the KID of features [N, F] and [M, F]: mean and deviation over random subsets.

    It is the unbiased squared maximum mean discrepancy with the kernel (x y / F + 1)^3
    (arXiv 1801.01401). torch-fidelity draws the same subsets and sums them in the features' precision.
    """
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    size = min(subset_size, len(a), len(b))
    rng = np.random.RandomState(SUBSETS_SEED)
    found = []
    for _ in range(subsets):
        chosen = [rng.choice(len(rows), size, replace=False) for rows in (a, b)]
        found.append(_discrepancy(a[chosen[0]], b[chosen[1]]))
    values = torch.stack(found)
    return float(values.mean()), float(values.std(correction=0))


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of rows [n, F] and [n, F]."""
    n = len(x)
    within = _kernel(x, x).fill_diagonal_(0).sum() + _kernel(y, y).fill_diagonal_(0).sum()
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(x.new_ones(1), x, y.T, alpha=1 / x.shape[1]).pow_(3)

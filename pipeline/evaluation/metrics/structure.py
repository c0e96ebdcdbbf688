"""Structure of the latent space: how much of the labels can be read from z."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.metrics.statistics import balanced_accuracy, percentiles

RIDGE = 1e-2  # of the variance; keeps the linear rule defined for few images


def label_accuracy(z: np.ndarray, labels: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean balanced accuracy of reading labels bool [N, A] from z [N, D] by ridge regression, and its 95 % interval over attributes.

    Fitted on the even rows, measured on the odd ones; a class is decided midway between the two classes' mean scores.
    """
    z = z.astype(np.float64)
    z = (z - z[::2].mean(0)) / (z[::2].std(0) + 1e-12)
    fit, target = z[::2], labels[::2].astype(np.float64)
    usable = [
        i
        for i, column in enumerate(labels.T)
        if min(x[:, i].sum() for x in (labels[::2], labels[1::2])) > 0 and not column.all()
    ]
    weights = np.linalg.solve(
        fit.T @ fit + RIDGE * len(fit) * np.eye(z.shape[1]), fit.T @ (target - target.mean(0))
    )
    scores = fit @ weights
    middle = np.array(
        [(scores[labels[::2][:, i], i].mean() + scores[~labels[::2][:, i], i].mean()) / 2 for i in usable]
    )
    found = balanced_accuracy((z[1::2] @ weights)[:, usable] > middle, labels[1::2][:, usable])
    rng = np.random.default_rng(0)
    drawn = np.nanmean(found[rng.integers(len(found), size=(1000, len(found)))], 1)
    return float(np.nanmean(found)), percentiles(drawn)

"""Structure of the latent space: labels in z, and what labels do not explain."""

from __future__ import annotations

import math

import numpy as np

from pipeline.evaluation.metrics.base import Interval
from pipeline.evaluation.metrics.statistics import balanced_accuracy, nanmean, percentiles

RIDGE = 1e-2  # relative to the variance; keeps the linear rule defined for few images
RESAMPLES = 1000


def label_accuracy(z: np.ndarray, labels: np.ndarray) -> tuple[float, Interval | None]:
    """Mean balanced accuracy of reading labels bool [N, A] from z [N, D] by ridge regression.

    The rule is fitted on the even rows and measured on the odd ones. It decides midway between the
    mean scores of the two classes. An attribute counts if both halves hold both of its classes.
    Returns nan if none does, and the 95 % interval over attributes, which needs two of them.
    """
    fitted, measured = labels[::2], labels[1::2]
    usable = _has_both_classes(fitted) & _has_both_classes(measured)
    if not usable.any():
        return math.nan, None
    fitted, measured = fitted[:, usable], measured[:, usable]

    z = z.astype(np.float64)
    z = (z - z[::2].mean(0)) / (z[::2].std(0) + 1e-12)
    x, target = z[::2], fitted.astype(np.float64)
    gram = x.T @ x + RIDGE * len(x) * np.eye(z.shape[1])
    weights = np.linalg.solve(gram, x.T @ (target - target.mean(0)))
    decided = z[1::2] @ weights > _midway(x @ weights, fitted)
    accuracies = balanced_accuracy(decided, measured)

    value = float(accuracies.mean())
    if len(accuracies) < 2:
        return value, None
    rng = np.random.default_rng(0)
    drawn = accuracies[rng.integers(len(accuracies), size=(RESAMPLES, len(accuracies)))]
    return value, percentiles(nanmean(drawn, 1))


def unexplained_deviation(x: np.ndarray, labels: np.ndarray) -> float:
    """Standard deviation of `x` [N] after a linear fit to labels [N, A]; nan if the fit is exact."""
    design = np.column_stack([np.ones(len(labels)), labels])
    if len(x) <= design.shape[1]:
        return math.nan
    coefficients, *_ = np.linalg.lstsq(design, x, rcond=None)
    return float((x - design @ coefficients).std())


def _has_both_classes(labels: np.ndarray) -> np.ndarray:
    return np.logical_and(labels.any(0), ~labels.all(0))


def _midway(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The point midway between the mean scores of the two classes, [N, A] -> [A]."""
    yes = (scores * labels).sum(0) / labels.sum(0)
    no = (scores * ~labels).sum(0) / (~labels).sum(0)
    return (yes + no) / 2

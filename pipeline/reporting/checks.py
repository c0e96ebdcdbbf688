"""Checks of the method in a finished run: one question, one number and one verdict each.

The questions are the usual doubts about an optimal decoder variance and a learned prior. Does
sigma* follow the error? Does the flow stay away from singular maps? Does p(z|y) know the labels,
and is it more than a rescaled Gaussian?
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cvae.config import ModelConfig
from pipeline.reporting.text import number
from pipeline.rundir.record import Evaluation
from pipeline.training.health import log_det_limit

SAME_VARIANCE = 1e-6  # relative
FOLLOWS = 0.9  # rank correlation
CURVED_NATS = 1.0  # a density off by the factor e on average
DIFFERENT_P = 0.05


class Check(NamedTuple):
    """A question, what was measured, "yes" or "no", and how that was decided."""

    question: str
    found: str
    verdict: str
    rule: str


def checks(model: ModelConfig, records: list[dict[str, Any]], evaluation: Evaluation | None) -> list[Check]:
    """Return all checks that the records of metrics.jsonl and the headline evaluation allow."""
    found: list[Check] = []
    if model.variance.name == "optimal":
        found += _of_variance(records)
    if model.prior.name == "flow":
        found += _of_flow(model, records)
    if evaluation:
        found += _of_prior(evaluation)
    return found


def _of_variance(records: list[dict[str, Any]]) -> Iterator[Check]:
    sigma, mse = _series(records, "train/sigma", "train/mse")
    if len(sigma):
        off = np.abs(sigma**2 / (4 * mse) - 1).max()  # mse is on the [0, 1] scale
        yield Check(
            question="is σ*² the MSE of the global batch, at every step?",
            found=f"at most {off:.2g} relative, {len(sigma)} steps",
            verdict=_word(off < SAME_VARIANCE),
            rule=f"relative difference below {SAME_VARIANCE:g}",
        )
    sigma, mse = _series(records, "val_ema/sigma", "val_ema/mse")
    if len(sigma) > 2:
        rank = rank_correlation(sigma, mse)
        first, last = _sigma_and_error(sigma[0], mse[0]), _sigma_and_error(sigma[-1], mse[-1])
        yield Check(
            question="does σ* follow the error on held-out images?",
            found=f"rank correlation {rank:.3f} over {len(sigma)} validations ({first} to {last})",
            verdict=_word(rank > FOLLOWS),
            rule=f"rank correlation above {FOLLOWS:g}",
        )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two series; 0 if one of them is constant."""
    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value; equal ones share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - counts / 2)[which]  # not scipy.stats, which takes seconds to import


def _of_flow(model: ModelConfig, records: list[dict[str, Any]]) -> Iterator[Check]:
    low, high = _series(records, "val_ema/log_det_min", "val_ema/log_det_max")
    if not len(low):
        return
    limit = log_det_limit(model)
    reach = f"from {number(low.min())} to {number(high.max())} nats"
    yield Check(
        question="does the flow's Jacobian stay away from singular?",
        found=f"log|det ∂f/∂z| {reach} on held-out images ({len(low)} validations)",
        verdict=_word(max(-low.min(), high.max()) < limit),
        rule=f"within half of the bound ±{number(2 * limit)}: no singular map",
    )


def _of_prior(evaluation: Evaluation) -> Iterator[Check]:
    """Checks of the learned prior.

    A check that needs an interval is left out if too few images gave none.
    """
    metrics, intervals = evaluation.metrics, evaluation.intervals
    name = "label_structure_prior"
    if metrics.get(name) is not None and name in intervals:
        drawn = f"{number(metrics[name])} {_brackets(intervals[name])} from drawn z"
        encoded = f"{number(metrics.get('label_structure_encoded'))} from encoded z"
        yield Check(
            question="do z drawn from p(z|y) carry the labels?",
            found=f"balanced accuracy {drawn}, {encoded}",
            verdict=_word(intervals[name][0] > 0.5),
            rule="interval above 0.5; t-SNE: the drawing “latents”",
        )
    curvature = metrics.get("flow_curvature_nats")
    if curvature is not None:
        yield Check(
            question="is the prior more than a moved and rescaled Gaussian?",
            found=f"log|det ∂f/∂z| varies by {number(curvature)} nats beyond what y explains",
            verdict=_word(curvature > CURVED_NATS),
            rule=f"above {CURVED_NATS:g} nat",
        )
    name = "prior_density_gap"
    if metrics.get(name) is not None and name in intervals:
        low, high = intervals[name]
        p = metrics.get("prior_mmd_p_value")
        gap = f"{number(metrics[name])} {_brackets(intervals[name])} nats"
        yield Check(
            question="does the average of q(z|x,y) match p(z|y)?",
            found=f"log p(z|y) of drawn minus encoded z: {gap}; MMD² p = {number(p)}",
            verdict=_word(low <= 0 <= high and (p or 0.0) > DIFFERENT_P),
            rule=f"interval holds 0 and the permutation test finds no difference (p > {DIFFERENT_P:g})",
        )


def _series(records: list[dict[str, Any]], *names: str) -> tuple[np.ndarray, ...]:
    """The values of several metrics at the steps where all are finite, each [n]."""
    rows = []
    for record in records:
        row = [record["values"].get(name, math.nan) for name in names]
        if all(math.isfinite(value) for value in row):
            rows.append(row)
    return tuple(np.array(rows, np.float64).reshape(-1, len(names)).T)


def _sigma_and_error(sigma: float, mse: float) -> str:
    return f"σ* {number(sigma)}, √MSE {number(2 * math.sqrt(mse))}"


def _brackets(interval: list[float]) -> str:
    low, high = interval
    return f"[{number(low)}, {number(high)}]"


def _word(yes: bool | np.bool_) -> str:
    return "yes" if yes else "no"

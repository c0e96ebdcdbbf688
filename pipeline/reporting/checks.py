"""What the method rests on, checked in a finished run: one question, one number and one verdict each.

The questions are the usual doubts about an optimal decoder variance and a learned prior: does sigma* follow the error, does the
flow stay away from singular maps, does p(z|y) know the labels, and is it more than a rescaled Gaussian?
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from cvae.config import ModelConfig
from pipeline.reporting.headline import number
from pipeline.rundir.record import Evaluation
from pipeline.training.health import log_det_limit

CURVED_NATS = 1.0  # a density off by the factor e on average


class Check(NamedTuple):
    """A question, what was measured, "yes" or "no", and how that was decided."""

    question: str
    found: str
    verdict: str
    rule: str


def checks(model: ModelConfig, records: list[dict[str, Any]], evaluation: Evaluation | None) -> list[Check]:
    """All checks that a run's metrics.jsonl `records` and its headline evaluation allow."""
    found = [*_of_training(model, records)]
    return [*found, *_of_the_prior(model, evaluation)] if evaluation else found


def _of_training(model: ModelConfig, records: list[dict[str, Any]]) -> Iterator[Check]:
    sigma, mse = _series(records, "train/sigma", "train/mse")
    if len(sigma) and model.variance.name != "unit":
        off = np.abs(sigma**2 / (4 * mse) - 1).max()  # mse is on the [0, 1] scale
        found = f"at most {off:.2g} relative, {len(sigma)} steps"
        yield Check(
            "is σ*² the MSE of the global batch, at every step?",
            found,
            _word(off < 1e-6),
            "relative difference below 1e-6",
        )
    sigma, held_out = _series(records, "val_ema/sigma", "val_ema/mse")
    if len(sigma) > 2 and model.variance.name != "unit":
        moving = len(set(sigma)) > 1 and len(set(held_out)) > 1  # a constant has no ranks
        rank = float(spearmanr(sigma, held_out).statistic) if moving else 0.0
        ends = " to ".join(
            f"σ* {number(s)}, √MSE {number(2 * math.sqrt(m))}"
            for s, m in ((sigma[i], held_out[i]) for i in (0, -1))
        )
        text = f"rank correlation {rank:.3f} over {len(sigma)} validations ({ends})"
        yield Check(
            "does σ* follow the error on held-out images?",
            text,
            _word(rank > 0.9),
            "rank correlation above 0.9",
        )
    low, high = _series(records, "val_ema/log_det_min", "val_ema/log_det_max")
    if len(low) and model.prior.name == "flow":
        limit = log_det_limit(model)
        text = f"log|det ∂f/∂z| from {number(low.min())} to {number(high.max())} nats on held-out images ({len(low)} validations)"
        rule = f"within half of the bound ±{number(2 * limit)}: no singular map"
        yield Check(
            "does the flow's Jacobian stay away from singular?",
            text,
            _word(max(-low.min(), high.max()) < limit),
            rule,
        )


def _of_the_prior(model: ModelConfig, evaluation: Evaluation) -> Iterator[Check]:
    metrics, name = evaluation.metrics, "label_structure_prior"
    if metrics.get(name) is not None:
        low, high = evaluation.intervals[name]
        text = f"balanced accuracy {number(metrics[name])} [{number(low)}, {number(high)}] from drawn z"
        text += f", {number(metrics['label_structure_encoded'])} from encoded z"
        yield Check(
            "do z drawn from p(z|y) carry the labels?",
            text,
            _word(low > 0.5),
            "interval above 0.5; t-SNE: the drawing “latents”",
        )
    curvature = metrics.get("flow_curvature_nats")
    if curvature is not None and model.prior.name == "flow":
        text = f"log|det ∂f/∂z| varies by {number(curvature)} nats beyond what y explains"
        yield Check(
            "is the prior more than a moved and rescaled Gaussian?",
            text,
            _word(curvature > CURVED_NATS),
            f"above {CURVED_NATS:g} nat",
        )
    gap = metrics.get("prior_density_gap")
    if gap is not None:
        low, high = evaluation.intervals["prior_density_gap"]
        text = f"log p(z|y) of drawn minus encoded z: {number(gap)} [{number(low)}, {number(high)}] nats; MMD² p = "
        text += number(metrics.get("prior_mmd_p_value"))
        rule = "interval holds 0 and the permutation test finds no difference (p > 0.05)"
        matched = low <= 0 <= high and (metrics.get("prior_mmd_p_value") or 0.0) > 0.05
        yield Check("does the average of q(z|x,y) match p(z|y)?", text, _word(matched), rule)


def _series(records: list[dict[str, Any]], *names: str) -> tuple[np.ndarray, ...]:
    """The values of several metrics at the steps where all are finite, each [n]."""
    rows = [[r["values"].get(name, math.nan) for name in names] for r in records]
    return tuple(
        np.array([row for row in rows if all(map(math.isfinite, row))], np.float64).reshape(-1, len(names)).T
    )


def _word(yes: bool | np.bool_) -> str:
    return "yes" if yes else "no"

"""Rows of evidence -> numbers. A new metric is a class here and its line in METRICS.

A metric names the parts of the evidence that it `needs`, which all ranks compute together, and is then called on rank 0.
It yields (name, Value), or (name, table) for what is a table of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from cvae.losses import active_units, bits_per_dim
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.statistics import balanced_accuracy, bootstrap, frechet_distance, moments, wilson


class Value(NamedTuple):
    """A number and what it is to be read against."""

    value: float
    interval: tuple[float, float] | None = None  # 95 %
    ceiling: float | None = None  # what a perfect model would reach
    floor: float | None = None  # what knowing nothing reaches


class Metric:
    """One metric; `needs` are attributes of Evidence."""

    needs: tuple[str, ...] = ()

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield (name, Value or table); rank 0 alone calls it."""
        raise NotImplementedError


class FrechetDistance(Metric):
    """Distance of reconstructions and of samples to the real images, for each kind of features.

    Ceiling: as many training images; floor: the mean training image over and over.
    """

    needs = ("real", "train", "mean_image", "reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield <features>_recon and <features>_samples."""
        for name in evidence.real:
            real = moments(evidence.real[name])
            ceiling, floor = (frechet_distance(moments(rows[name]), real) for rows in (evidence.train, evidence.mean_image))
            for what, rows in (("recon", evidence.reconstructions), ("samples", evidence.samples)):
                yield f"{name}_{what}", Value(frechet_distance(moments(rows[name]), real), None, ceiling, floor)


class AttributeAgreement(Metric):
    """Whether the classifier finds in a sample the attributes that were asked for (those that the model reads).

    Ceiling: the classifier on the real images with these attributes; floor: samples against the requests of other samples.
    """

    needs = ("real", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield attribute_accuracy, attribute_balanced_accuracy and the table per_attribute."""
        wanted, seed = evidence.requested.astype(bool), evidence.settings.seed
        shuffled = wanted[np.random.default_rng(seed).permutation(len(wanted))]
        decide, read = evidence.classifier.decide, evidence.read_columns
        sampled, real = (decide(rows["fd_classifier"])[:, read] for rows in (evidence.samples, evidence.real))
        compared = ((sampled, wanted), (real, wanted), (sampled, shuffled))
        accuracies = [(decided == target).mean(0) for decided, target in compared]
        balanced = [balanced_accuracy(decided, target) for decided, target in compared]
        right = (compared[0][0] == wanted).mean(1)
        interval = bootstrap(lambda weights: weights @ right / len(right), len(right), seed)
        yield "attribute_accuracy", Value(accuracies[0].mean(), interval, accuracies[1].mean(), accuracies[2].mean())
        interval = bootstrap(lambda weights: np.nanmean(balanced_accuracy(*compared[0], weights), 1), len(right), seed)
        yield "attribute_balanced_accuracy", Value(np.nanmean(balanced[0]), interval, np.nanmean(balanced[1]), np.nanmean(balanced[2]))
        yield "per_attribute", self._table(evidence, [*accuracies, *balanced])

    def _table(self, evidence: Evidence, columns: list[np.ndarray]) -> dict[str, dict[str, Any]]:
        """Numbers of the attributes that the model reads; the others are only named."""
        kinds = [f"{who}{what}" for what in ("accuracy", "balanced_accuracy") for who in ("", "real_", "shuffled_")]
        rows = (dict(zip(kinds, map(_finite, row), strict=True)) for row in zip(*columns, strict=True))
        found = dict(zip(evidence.info.attributes, rows, strict=True))
        return {name: {**found.get(name, {}), "read_by_model": name in found} for name in evidence.classifier.attributes}


class RareCombinations(Metric):
    """Whether both attributes of a rare pair are found in samples that were asked for both; ceiling: in real images with both."""

    needs = ("real", "rare")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield rare_success, the mean over pairs, and the table rare."""
        decided = evidence.classifier.decide(evidence.real["fd_classifier"])
        rows: list[dict[str, Any]] = []
        for pair, sampled in evidence.rare:
            both = [evidence.classifier.attributes.index(name) for name in pair.attributes]
            found = int(evidence.classifier.decide(sampled["fd_classifier"])[:, both].all(axis=1).sum())
            labelled = evidence.requested[:, [evidence.info.attributes.index(name) for name in pair.attributes]].all(axis=1)
            n, real_n = len(sampled["fd_classifier"]), int(labelled.sum())
            real = int(decided[labelled][:, both].all(axis=1).sum()) / real_n if real_n else None
            low, high = wilson(found, n)
            success = {"success": found / n, "low": low, "high": high, "n": n, "real_success": real, "real_n": real_n}
            rows.append({**pair._asdict(), **success})
        if rows:
            ceiling = [row["real_success"] for row in rows if row["real_success"] is not None]
            yield "rare_success", Value(_mean([row["success"] for row in rows]), None, _mean(ceiling) if ceiling else None)
        yield "rare", rows


class Reconstruction(Metric):
    """Squared error of reconstructions on the [0, 1] scale; floor: the mean training image."""

    needs = ("mean_image", "reconstructions")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield mse and sigma, the decoder's standard deviation on the [-1, 1] scale."""
        mse = evidence.reconstructions["mse"]
        yield "mse", Value(mse.mean(), _normal_interval(mse), None, evidence.mean_image["mse"].mean())
        yield "sigma", Value(math.sqrt(evidence.info.s2))


class Likelihood(Metric):
    """Importance-weighted bound on log p(x|y) with K samples per image."""

    needs = ("log_likelihood",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield the bound in nats per image, its standard error, and in bits per dimension (lower is better)."""
        nats = evidence.log_likelihood.astype(np.float64)
        if not len(nats):
            return
        interval = _normal_interval(nats)
        low, high = (bits_per_dim(-end, evidence.model.pixels) for end in reversed(interval))
        yield "iw_log_likelihood_nats", Value(nats.mean(), interval)
        yield "iw_log_likelihood_standard_error", Value(_standard_error(nats))
        yield "iw_bits_per_dim", Value(bits_per_dim(-nats.mean(), evidence.model.pixels), (low, high))


class ActiveUnits(Metric):
    """Latent units whose posterior mean moves with the image (`cvae.losses.active_units`)."""

    needs = ("reconstructions",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield active_units; at most z_dim."""
        mean, variance = (torch.from_numpy(evidence.reconstructions[name]).double() for name in ("mean", "variance"))
        yield "active_units", Value(active_units(len(mean), mean.sum(0), mean.square().sum(0), variance.sum(0)), None, evidence.model.z_dim)


METRICS: dict[str, type[Metric]] = {
    "frechet": FrechetDistance,
    "attributes": AttributeAgreement,
    "rare": RareCombinations,
    "reconstruction": Reconstruction,
    "likelihood": Likelihood,
    "active_units": ActiveUnits,
}


def collect(found: dict[str, Any]) -> dict[str, Any]:
    """{name: Value or table} -> the sections metrics, intervals, ceilings and floors, and every table under its own name.

    What is not finite becomes null: JSON knows no NaN.
    """
    values = {name: value for name, value in found.items() if isinstance(value, Value)}
    sections: dict[str, Any] = {
        "metrics": {name: _finite(v.value) for name, v in values.items()},
        "intervals": {name: [_finite(end) for end in v.interval] for name, v in values.items() if v.interval is not None},
        "ceilings": {name: _finite(v.ceiling) for name, v in values.items() if v.ceiling is not None},
        "floors": {name: _finite(v.floor) for name, v in values.items() if v.floor is not None},
    }
    return sections | {name: table for name, table in found.items() if name not in values}


def _mean(x: list[float]) -> float:
    return sum(x) / len(x)


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _standard_error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def _normal_interval(x: np.ndarray) -> tuple[float, float]:
    half = 1.959964 * _standard_error(x)
    return float(x.mean() - half), float(x.mean() + half)

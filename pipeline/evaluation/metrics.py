"""Rows of evidence -> numbers. A new metric is a class here and its line in METRICS.

A metric names the parts of the evidence that it `needs`, which all ranks compute together, and is then called on rank 0.
It yields (name, Value), or (name, table) for what is a table of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

    Ceiling: one half of the real images against the other, so N/2 each; floor: the mean training image over and over.
    Training images have a distance of their own: a classifier's features know them, and they may come from other sources.
    """

    needs = ("real", "train", "mean_image", "reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield <features>_recon, <features>_samples and <features>_train."""
        for name, rows in evidence.real.items():
            real = moments(rows)
            halves = frechet_distance(moments(rows[::2]), moments(rows[1::2]))
            floor = frechet_distance(moments(evidence.mean_image[name]), real)
            for what, others in (("recon", evidence.reconstructions), ("samples", evidence.samples), ("train", evidence.train)):
                yield f"{name}_{what}", Value(frechet_distance(moments(others[name]), real), None, halves, floor)


class AttributeAgreement(Metric):
    """Whether the classifier finds in a sample the attributes of the image whose attributes were asked for.

    Ceiling: the classifier on the real images themselves; floor: samples against the attributes of other images, which has an
    interval of its own under <name>_shuffled. Over all attributes, and as <name>_read over those that the model reads.
    """

    needs = ("real", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield attribute_accuracy, attribute_balanced_accuracy, both also with _read and _shuffled, and the table per_attribute."""
        wanted, seed = evidence.annotated.astype(bool), evidence.settings.seed
        shuffled = wanted[np.random.default_rng(seed).permutation(len(wanted))]
        sampled, real = (evidence.classifier.decide(rows["fd_classifier"]) for rows in (evidence.samples, evidence.real))
        compared = ((sampled, wanted), (real, wanted), (sampled, shuffled))
        scores = {
            "attribute_accuracy": lambda decided, target, weights: weights @ (decided == target) / len(target),
            "attribute_balanced_accuracy": balanced_accuracy,
        }
        everyone = np.ones((1, len(wanted)))
        each = {name: [score(*pair, everyone)[0] for pair in compared] for name, score in scores.items()}
        for name, score in scores.items():
            for suffix, chosen in (("", slice(None)), ("_read", evidence.read_columns)):
                value, ceiling, floor = (float(np.nanmean(row[chosen])) for row in each[name])
                ends = [self._interval(score, decided[:, chosen], target[:, chosen], seed) for decided, target in compared[::2]]
                yield name + suffix, Value(value, ends[0], ceiling, floor)
                yield f"{name}{suffix}_shuffled", Value(floor, ends[1])
        yield "per_attribute", self._table(evidence, each)

    @staticmethod
    def _interval(score: Callable[..., np.ndarray], decided: np.ndarray, target: np.ndarray, seed: int) -> tuple[float, float]:
        return bootstrap(lambda weights: np.nanmean(score(decided, target, weights), 1), len(target), seed)

    @staticmethod
    def _table(evidence: Evidence, each: dict[str, list[np.ndarray]]) -> dict[str, dict[str, Any]]:
        columns = {
            f"{who}{name.removeprefix('attribute_')}": row
            for name, rows in each.items()
            for who, row in zip(("", "real_", "shuffled_"), rows, strict=True)
        }
        read = set(evidence.info.attributes)
        return {
            name: {column: _finite(row[i]) for column, row in columns.items()} | {"read_by_model": name in read}
            for i, name in enumerate(evidence.classifier.attributes)
        }


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
        for name, rows in evidence.log_likelihood.items():
            nats = rows.astype(np.float64)
            if not len(nats):
                continue
            interval = _normal_interval(nats)
            low, high = (bits_per_dim(-end, evidence.model.pixels) for end in reversed(interval))
            yield f"{name}_log_likelihood_nats", Value(nats.mean(), interval)
            yield f"{name}_log_likelihood_standard_error", Value(_standard_error(nats))
            yield f"{name}_bits_per_dim", Value(bits_per_dim(-nats.mean(), evidence.model.pixels), (low, high))


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

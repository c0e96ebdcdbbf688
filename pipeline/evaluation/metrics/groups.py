"""Metrics of attributes that are asked for alone, in pairs or in rare combinations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric, Value, around
from pipeline.evaluation.metrics.frechet import feature_sums, frechet_distance, moments
from pipeline.evaluation.metrics.statistics import resample, wilson
from pipeline.evaluation.rare import MIN_HELD_OUT, MIN_TRAIN, Combination

MIN_GROUP = 200  # images in a group, and outside of it
SHOWN_PAIRS = 10  # in the table of pairs


class Groups(Metric):
    """Samples that were asked for an attribute against the real images that have it.

    Counted are groups of at least 200 images with at least 200 outside. group_fd is the Fréchet
    distance within a group; its ceiling is that of other held-out images of the group, at most as many:
    fewer of them make it larger. group_diversity is the root mean squared distance between two samples of a
    group over that of real images: 1 is as diverse.
    """

    needs = ("real", "others", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield group_fd and group_diversity if there is a group, and the table groups."""
        real, sampled = evidence["real"]["fd_classifier"], evidence["samples"]["fd_classifier"]
        others = evidence["others"].get("fd_classifier")
        held_out = "val" if evidence.settings.split == "test" else "test"
        labels = evidence.labels(held_out)[evidence.positions(held_out)].astype(bool)
        rows: list[dict[str, Any]] = []
        for k, (name, column) in enumerate(zip(evidence.info.attributes, evidence.requested.T, strict=True)):
            inside = column.astype(bool)
            if min(inside.sum(), (~inside).sum()) >= MIN_GROUP:
                alike = None if others is None else others[labels[:, k]][: inside.sum()]
                found = _compare_group(sampled[inside], real[inside], alike)
                rows.append({"attribute": name, **found})
        if rows:
            among = f"mean over {len(rows)} groups that share an attribute"
            images = sum(row["n"] for row in rows)
            yield (
                "group_fd",
                Value(
                    value=float(np.mean([row["fd"] for row in rows])),
                    direction="lower",
                    meaning=f"Fréchet distance of samples to real images, {among}",
                    n=images,
                    ceiling=float(np.mean([row["real_fd"] for row in rows])),
                    ceiling_name="other real images",
                    over_read_attributes=True,
                ),
            )
            yield (
                "group_diversity",
                Value(
                    value=float(np.mean([row["distance"] / row["real_distance"] for row in rows])),
                    direction="higher",
                    meaning=f"spread of the samples' features over that of real images, {among}",
                    n=images,
                    ceiling=1.0,
                    floor=0.0,
                    floor_name="one image, repeated",
                    over_read_attributes=True,
                ),
            )
        yield "groups", rows


def _compare_group(sampled: np.ndarray, real: np.ndarray, others: np.ndarray | None) -> dict[str, Any]:
    best = math.nan
    if others is not None and len(others):
        best = frechet_distance(moments(others), moments(real))
    return {
        "n": len(real),
        "fd": frechet_distance(moments(sampled), moments(real)),
        "real_fd": best,
        "distance": _mean_distance(sampled),
        "real_distance": _mean_distance(real),
    }


def _mean_distance(features: np.ndarray) -> float:
    """Root mean squared distance between two rows of features [N, F]."""
    return math.sqrt(2 * float(feature_sums(features).moments.covariance.trace()))


class AttributePairs(Metric):
    """Mean absolute difference between the pair frequencies of samples and of real images.

    The frequency of a pair is the share of images in which the classifier finds both attributes. The
    mean goes over all pairs. The ceiling is the distance of as many other held-out images. The floor
    is theirs too, after each attribute was shuffled among them: as frequent as before, but independent.
    The interval is normal, with the deviation over resampled images.
    """

    needs = ("real", "others", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield attribute_pairs and the table attribute_pairs_off."""
        names, decide = evidence.classifier.attributes, evidence.classifier.decide
        if len(names) < 2:
            return
        decided_real = decide(evidence["real"]["fd_classifier"])
        real, samples = both(decided_real), both(decide(evidence["samples"]["fd_classifier"]))
        there, found = real.mean(0), samples.mean(0)

        held_out, ceiling = decided_real, None
        if "fd_classifier" in evidence["others"]:
            held_out = decide(evidence["others"]["fd_classifier"])
            ceiling = frequency_distance(both(held_out).mean(0), there)
        independent = np.random.default_rng(evidence.settings.seed).permuted(held_out, axis=0)
        value = frequency_distance(found, there)
        yield (
            "attribute_pairs",
            Value(
                value=value,
                direction="lower",
                meaning="mean absolute difference between the pair frequencies of samples and real images",
                n=len(samples),
                interval=around(value, _pairs_error(samples - real, evidence.settings.seed)),
                ceiling=ceiling,
                floor=frequency_distance(both(independent).mean(0), there),
                ceiling_name="other real images",
                floor_name="attributes shuffled",
            ),
        )
        yield "attribute_pairs_off", _most_off(names, found, there)


class RareCombinations(Metric):
    """Do samples show all attributes of a rare pair or triple that was asked for?

    The ceiling is real images with them. The headline pools all combinations. The paper's own cases
    stand in the table, but without a ceiling and outside of the pool if too few images carry them.
    """

    needs = ("real", "rare")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield rare_success, rare_pairs_success, rare_triples_success and the table rare."""
        rows = self._rows(evidence)
        counted = [row for row in rows if not row["showcase"]]
        for name, sizes, which in (
            ("rare_success", (2, 3), "pair or triple"),
            ("rare_pairs_success", (2,), "pair"),
            ("rare_triples_success", (3,), "triple"),
        ):
            pool = [row for row in counted if len(row["attributes"]) in sizes]
            if not pool:
                continue
            n, found = sum(row["n"] for row in pool), sum(row["found"] for row in pool)
            real = [row["real_found"] / row["real_n"] for row in pool if row["real_n"]]
            yield (
                name,
                Value(
                    value=found / n,
                    direction="higher",
                    meaning=f"share of samples with all attributes of the rare {which} that was asked for,"
                    f" {len(pool)} combinations",
                    n=n,
                    interval=wilson(found, n),
                    ceiling=sum(real) / len(real) if real else None,  # each counts alike, as the samples do
                    over_read_attributes=True,
                ),
            )
        yield "rare", rows

    @staticmethod
    def _rows(evidence: Evidence) -> list[dict[str, Any]]:
        rare = evidence["rare"]
        if "fd_classifier" not in rare:  # no combination, or no samples were asked for
            return []
        decided_real = evidence.classifier.decide(evidence["real"]["fd_classifier"])
        decided = evidence.classifier.decide(rare["fd_classifier"])
        rows = []
        for i, combination in enumerate(evidence.rare_combinations()):
            rows.append(_rare_row(evidence, combination, decided[rare["combination"] == i], decided_real))
        return rows


def _rare_row(
    evidence: Evidence, combination: Combination, decided: np.ndarray, decided_real: np.ndarray
) -> dict[str, Any]:
    """One row of the table `rare`, from decisions on its samples [m, A] and on real images [n, A]."""
    attributes = combination.attributes
    judged = [evidence.classifier.attributes.index(name) for name in attributes]
    read = [evidence.info.attributes.index(name) for name in attributes]
    labelled = evidence.requested[:, read].all(1)
    n, found = len(decided), int(decided[:, judged].all(1).sum())
    real_n, real_found = int(labelled.sum()), int(decided_real[labelled][:, judged].all(1).sum())
    low, high = wilson(found, n)

    too_few = combination.train_count < MIN_TRAIN or combination.held_out_count < MIN_HELD_OUT
    showcase = attributes in evidence.showcase and too_few
    return {
        **combination._asdict(),
        "dataset_count": _dataset_count(evidence, attributes),
        "success": found / n,
        "low": low,
        "high": high,
        "found": found,
        "n": n,
        "showcase": showcase,
        "real_success": real_found / real_n if real_n and not showcase else None,
        "real_found": real_found,
        "real_n": real_n,
    }


def _dataset_count(evidence: Evidence, attributes: tuple[str, ...]) -> int | None:
    """Images of the whole dataset that carry `attributes`, or None without its annotations."""
    if evidence.annotations is None:
        return None
    names = evidence.splits["train"].attribute_names
    columns = [names.index(name) for name in attributes]
    return int(evidence.annotations.labels[:, columns].all(1).sum())


def both(decided: np.ndarray) -> np.ndarray:
    """Decisions bool [N, A] -> whether both attributes of each pair i < j are there, float64 [N, pairs]."""
    first, second = np.triu_indices(decided.shape[1], 1)
    return (decided[:, first] & decided[:, second]).astype(np.float64)


def frequency_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two lists of frequencies."""
    return float(np.abs(a - b).mean())


def _pairs_error(difference: np.ndarray, seed: int) -> float:
    """Standard error of the distance, from differences [N, pairs] of each sample and its real image."""
    n = len(difference)
    if n < 2:
        return float("nan")
    drawn = resample(lambda weights: np.abs(weights @ difference / n).mean(1), n, seed)
    return float(drawn.std(ddof=1))


def _most_off(names: list[str], found: np.ndarray, there: np.ndarray) -> list[dict[str, Any]]:
    """Return the pairs whose frequencies differ most, the largest difference first."""
    first, second = np.triu_indices(len(names), 1)
    largest = np.argsort(-np.abs(found - there), kind="stable")[:SHOWN_PAIRS]
    rows = []
    for k in largest:
        pair = [names[first[k]], names[second[k]]]
        rows.append({"attributes": pair, "samples": float(found[k]), "real": float(there[k])})
    return rows

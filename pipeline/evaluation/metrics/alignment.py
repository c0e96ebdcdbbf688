"""Metrics of obedience: do samples show the attributes that were asked for?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric, Value
from pipeline.evaluation.metrics.statistics import (
    balanced_accuracy,
    feature_sums,
    finite,
    frechet_distance,
    moments,
    nanmean,
    percentiles,
    resample,
    weighted_average_precision,
    wilson,
)
from pipeline.evaluation.rare import MIN_HELD_OUT, MIN_TRAIN, Combination

MIN_GROUP = 200  # images in a group, and outside of it


class Judged(NamedTuple):
    """The classifier's scores and decisions [N, A] on images, and what was asked for, bool [N, A]."""

    scores: np.ndarray
    decided: np.ndarray
    wanted: np.ndarray


class Score(NamedTuple):
    """A number per attribute, (Judged, weights [R, N]) -> [R, A], and its number of resamples."""

    function: Callable[[Judged, np.ndarray], np.ndarray]
    resamples: int
    meaning: str


def accuracy(judged: Judged, weights: np.ndarray) -> np.ndarray:
    """Share of decisions that are as wanted, for R reweightings [R, N] -> [R, A]."""
    return weights @ (judged.decided == judged.wanted) / weights.sum(1, keepdims=True)


def balanced(judged: Judged, weights: np.ndarray) -> np.ndarray:
    """Mean recall of the two classes, for R reweightings [R, N] -> [R, A]."""
    return balanced_accuracy(judged.decided, judged.wanted, weights)


def average_precisions(judged: Judged, weights: np.ndarray) -> np.ndarray:
    """Average precision of the scores, for R reweightings [R, N] -> [R, A]."""
    attributes = zip(judged.scores.T, judged.wanted.T, strict=True)
    return np.stack([weighted_average_precision(scores, wanted, weights) for scores, wanted in attributes], 1)


SCORES: dict[str, Score] = {
    "accuracy": Score(
        accuracy, 1000, "share of attributes that the classifier finds in samples as asked for"
    ),
    "balanced_accuracy": Score(
        balanced, 1000, "the same share, with equal weight for both classes of each attribute"
    ),
    # It sorts the images for each attribute, so it takes five times fewer resamples.
    "ap": Score(
        average_precisions, 200, "average precision of the classifier's scores for what was asked for"
    ),
}


class AttributeAgreement(Metric):
    """Does the classifier find in a sample the attributes that the sample was asked for?

    Every sample is compared with the image whose attributes were its request. The ceiling is the
    classifier on the real images themselves. The floor compares samples with the attributes of
    other images; `<name>_shuffled` holds its interval. Means go over all attributes, and as
    `<name>_read` over those that the model reads.
    """

    needs = ("real", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield attribute_accuracy, _balanced_accuracy, _ap and the table per_attribute."""
        seed = evidence.settings.seed
        wanted = evidence.annotated.astype(bool)
        n = len(wanted)
        shuffled = wanted[np.random.default_rng(seed).permutation(n)]
        samples = evidence.classifier.judge(evidence["samples"]["fd_classifier"])
        real = evidence.classifier.judge(evidence["real"]["fd_classifier"])
        asked = Judged(*samples, wanted)
        reference = Judged(*real, wanted)
        floor = Judged(*samples, shuffled)

        once = np.ones((1, n))
        table: dict[str, np.ndarray] = {}
        for short, score in SCORES.items():
            value = score.function(asked, once)[0]
            ceiling = score.function(reference, once)[0]
            lowest = score.function(floor, once)[0]
            drawn = resample(partial(score.function, asked), n, seed, score.resamples)
            drawn_floor = resample(partial(score.function, floor), n, seed, score.resamples)
            for suffix, chosen in (("", slice(None)), ("_read", evidence.read_columns)):
                name = f"attribute_{short}{suffix}"
                over_read = suffix == "_read"
                scope = "over the attributes that the model reads" if over_read else "over all attributes"
                yield (
                    name,
                    Value(
                        value=float(nanmean(value[chosen])),
                        direction="higher",
                        meaning=f"{score.meaning}, {scope}",
                        n=n,
                        interval=percentiles(nanmean(drawn[:, chosen], 1)),
                        ceiling=float(nanmean(ceiling[chosen])),
                        floor=float(nanmean(lowest[chosen])),
                        over_read_attributes=over_read,
                    ),
                )
                yield (
                    f"{name}_shuffled",
                    Value(
                        value=float(nanmean(lowest[chosen])),
                        direction="none",
                        meaning=f"{name} of samples against the attributes of other images",
                        n=n,
                        interval=percentiles(nanmean(drawn_floor[:, chosen], 1)),
                        headline=False,
                        over_read_attributes=over_read,
                    ),
                )
            table |= {short: value, f"real_{short}": ceiling, f"shuffled_{short}": lowest}
            table |= _bounds(short, drawn)
        yield "per_attribute", _per_attribute(evidence, table)


def _bounds(name: str, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Ends of the 95 % interval of every attribute, from resampled scores [R, A]."""
    unknown = (np.nan, np.nan)
    ends = np.array([percentiles(resampled) or unknown for resampled in drawn.T])
    return {f"{name}_low": ends[:, 0], f"{name}_high": ends[:, 1]}


def _per_attribute(evidence: Evidence, table: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Turn columns [A] into one entry per attribute."""
    read = set(evidence.info.attributes)
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(evidence.classifier.attributes):
        numbers = {column: finite(values[i]) for column, values in table.items()}
        found[name] = {**numbers, "read_by_model": name in read}
    return found


class Groups(Metric):
    """Samples that were asked for an attribute against the real images that have it.

    Counted are groups of at least 200 images with at least 200 outside. group_fd is the Fréchet
    distance within a group; its ceiling compares halves of the real group. group_diversity is the
    root mean squared distance between two samples of a group over that of real images: 1 is as
    diverse.
    """

    needs = ("real", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield group_fd and group_diversity if there is a group, and the table groups."""
        real, sampled = evidence["real"]["fd_classifier"], evidence["samples"]["fd_classifier"]
        rows: list[dict[str, Any]] = []
        for name, column in zip(evidence.info.attributes, evidence.requested.T, strict=True):
            inside = column.astype(bool)
            if min(inside.sum(), (~inside).sum()) >= MIN_GROUP:
                rows.append({"attribute": name, **_compare_group(sampled[inside], real[inside])})
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
                    over_read_attributes=True,
                ),
            )
        yield "groups", rows


def _compare_group(sampled: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    return {
        "n": len(real),
        "fd": frechet_distance(moments(sampled), moments(real)),
        "real_fd": frechet_distance(moments(real[::2]), moments(real[1::2])),
        "distance": _mean_distance(sampled),
        "real_distance": _mean_distance(real),
    }


def _mean_distance(features: np.ndarray) -> float:
    """Root mean squared distance between two rows of features [N, F]."""
    return float(np.sqrt(2 * np.trace(feature_sums(features).moments.covariance)))


class RareCombinations(Metric):
    """Do samples show all attributes of a rare pair or triple that was asked for?

    The ceiling is real images with them.

    The headline pools all combinations. The paper's own cases stand in the table, but without a
    ceiling and outside of the pool if too few images carry them.
    """

    needs = ("real", "rare")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield rare_success, rare_pairs_success, rare_triples_success and the table rare."""
        rows = self._rows(evidence)
        counted = [row for row in rows if not row["figure_5"]]
        for name, sizes, which in (
            ("rare_success", (2, 3), "pair or triple"),
            ("rare_pairs_success", (2,), "pair"),
            ("rare_triples_success", (3,), "triple"),
        ):
            pool = [row for row in counted if len(row["attributes"]) in sizes]
            if not pool:
                continue
            n, found = sum(row["n"] for row in pool), sum(row["found"] for row in pool)
            real_n, real_found = sum(row["real_n"] for row in pool), sum(row["real_found"] for row in pool)
            yield (
                name,
                Value(
                    value=found / n,
                    direction="higher",
                    meaning=f"share of samples with all attributes of the rare {which} that was asked for,"
                    f" {len(pool)} combinations",
                    n=n,
                    interval=wilson(found, n),
                    ceiling=real_found / real_n if real_n else None,
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
    figure_5 = attributes in evidence.showcase and too_few
    return {
        **combination._asdict(),
        "dataset_count": _dataset_count(evidence, attributes),
        "success": found / n,
        "low": low,
        "high": high,
        "found": found,
        "n": n,
        "figure_5": figure_5,
        "real_success": real_found / real_n if real_n and not figure_5 else None,
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

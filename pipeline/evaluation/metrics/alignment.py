"""Metrics of obedience: whether samples show the attributes that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric, Value, finite
from pipeline.evaluation.metrics.statistics import (
    balanced_accuracy,
    frechet_distance,
    moments,
    percentiles,
    resample,
    sums,
    weighted_average_precision,
    wilson,
)  # fmt: skip
from pipeline.evaluation.rare import FIGURE_5, MIN_HELD_OUT, MIN_TRAIN

MIN_GROUP = 200  # images of a group, and of what is not in it


class Judged(NamedTuple):
    """What the classifier says of images, and what was asked for: scores and decisions [N, A], wanted bool [N, A]."""

    scores: np.ndarray
    decided: np.ndarray
    wanted: np.ndarray


def accuracy(judged: Judged, weights: np.ndarray) -> np.ndarray:
    """Share of decisions that are as wanted, for R reweightings [R, N] -> [R, A]."""
    return weights @ (judged.decided == judged.wanted) / weights.sum(1, keepdims=True)


def balanced(judged: Judged, weights: np.ndarray) -> np.ndarray:
    """Mean recall of the two classes, for R reweightings [R, N] -> [R, A]."""
    return balanced_accuracy(judged.decided, judged.wanted, weights)


def ap(judged: Judged, weights: np.ndarray) -> np.ndarray:
    """Average precision of the scores, for R reweightings [R, N] -> [R, A]."""
    columns = zip(judged.scores.T, judged.wanted.T, strict=True)
    return np.stack([weighted_average_precision(scores, wanted, weights) for scores, wanted in columns], 1)


SCORES: dict[
    str, tuple[Callable[[Judged, np.ndarray], np.ndarray], int]
] = {  # and how many resamples its intervals take
    "attribute_accuracy": (accuracy, 1000),
    "attribute_balanced_accuracy": (balanced, 1000),
    "attribute_ap": (ap, 200),  # a sort's worth of sums for each attribute: five times fewer
}


class AttributeAgreement(Metric):
    """Whether the classifier finds in a sample the attributes of the image whose attributes were asked for.

    Ceiling: the classifier on the real images themselves; floor: samples against the attributes of other images, which has an
    interval of its own under <name>_shuffled. Over all attributes, and as <name>_read over those that the model reads.
    """

    needs = ("real", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield attribute_accuracy, _balanced_accuracy and _ap, each also with _read and _shuffled, and the table per_attribute."""
        wanted, seed = evidence.annotated.astype(bool), evidence.settings.seed
        shuffled = wanted[np.random.default_rng(seed).permutation(len(wanted))]
        asked = {
            "": (evidence.samples, wanted),
            "real_": (evidence.real, wanted),
            "shuffled_": (evidence.samples, shuffled),
        }
        of = {
            who: Judged(*evidence.classifier.judge(rows["fd_classifier"]), target)
            for who, (rows, target) in asked.items()
        }
        everyone = np.ones((1, len(wanted)))
        columns: dict[str, np.ndarray] = {}
        for name, (score, resamples) in SCORES.items():
            each = {who: score(judged, everyone)[0] for who, judged in of.items()}
            drawn = {
                who: resample(partial(score, of[who]), len(wanted), seed, resamples)
                for who in ("", "shuffled_")
            }
            for suffix, chosen in (("", slice(None)), ("_read", evidence.read_columns)):
                value, ceiling, floor = (
                    float(np.nanmean(each[who][chosen])) for who in ("", "real_", "shuffled_")
                )
                ends = {who: percentiles(np.nanmean(rows[:, chosen], 1)) for who, rows in drawn.items()}
                yield name + suffix, Value(value, ends[""], ceiling, floor)
                yield f"{name}{suffix}_shuffled", Value(floor, ends["shuffled_"])
            short = name.removeprefix("attribute_")
            columns |= {f"{who}{short}": row for who, row in each.items()}
            columns |= dict(
                zip(
                    (f"{short}_low", f"{short}_high"),
                    np.array([percentiles(rows) for rows in drawn[""].T]).T,
                    strict=True,
                )
            )
        read = set(evidence.info.attributes)
        yield (
            "per_attribute",
            {
                name: {column: finite(row[i]) for column, row in columns.items()}
                | {"read_by_model": name in read}
                for i, name in enumerate(evidence.classifier.attributes)
            },
        )


class Groups(Metric):
    """Samples that were asked for one attribute against the real images that have it, on the classifier's features.

    Frechet distance within each group of at least 200 images and as many without it (ceiling: halves of the real group), and diversity:
    the root of the mean squared distance between two images of the group, over that of real images (1 is as diverse).
    """

    needs = ("real", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield group_fd, group_diversity, the means over groups, and the table groups."""
        real, sampled = evidence.real["fd_classifier"], evidence.samples["fd_classifier"]
        rows: list[dict[str, Any]] = []
        for name, inside in zip(evidence.info.attributes, evidence.requested.T.astype(bool), strict=True):
            if min(inside.sum(), (~inside).sum()) < MIN_GROUP:
                continue
            a, b = sampled[inside], real[inside]
            spread = [float(np.sqrt(2 * np.trace(sums(x).moments.covariance))) for x in (a, b)]
            rows.append(
                {
                    "attribute": name,
                    "n": int(inside.sum()),
                    "fd": frechet_distance(moments(a), moments(b)),
                    "real_fd": frechet_distance(moments(b[::2]), moments(b[1::2])),
                    "distance": spread[0],
                    "real_distance": spread[1],
                }
            )
        if rows:
            yield (
                "group_fd",
                Value(_mean(row["fd"] for row in rows), None, _mean(row["real_fd"] for row in rows)),
            )
            yield (
                "group_diversity",
                Value(_mean(row["distance"] / row["real_distance"] for row in rows), None, 1.0, 0.0),
            )
        yield "groups", rows


class RareCombinations(Metric):
    """Whether all attributes of a rare pair or triple are found in samples that were asked for them; ceiling: in real images with them.

    The headline pools all combinations; the paper's own cases stand in the table without a ceiling and outside of the pool.
    """

    needs = ("real", "rare")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield rare_success and its parts rare_pairs_success and rare_triples_success, and the table rare."""
        decided = evidence.classifier.decide(evidence.real["fd_classifier"])
        rows = [self._row(evidence, decided, combination, sampled) for combination, sampled in evidence.rare]
        counted = [row for row in rows if not row["figure_5"]]
        for name, size in (
            ("rare_success", (2, 3)),
            ("rare_pairs_success", (2,)),
            ("rare_triples_success", (3,)),
        ):
            if pool := [row for row in counted if len(row["attributes"]) in size]:
                n, real_n = (sum(row[k] for row in pool) for k in ("n", "real_n"))
                found, real = sum(row["found"] for row in pool), sum(row["real_found"] for row in pool)
                yield name, Value(found / n, wilson(found, n), real / real_n if real_n else None)
        yield "rare", rows

    @staticmethod
    def _row(
        evidence: Evidence, decided: np.ndarray, combination: Any, sampled: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        attributes = combination.attributes
        judged = [evidence.classifier.attributes.index(name) for name in attributes]
        found = int(evidence.classifier.decide(sampled["fd_classifier"])[:, judged].all(1).sum())
        labelled = evidence.requested[:, [evidence.info.attributes.index(name) for name in attributes]].all(1)
        n, real_n, real = (
            len(sampled["fd_classifier"]),
            int(labelled.sum()),
            int(decided[labelled][:, judged].all(1).sum()),
        )
        low, high = wilson(found, n)
        shown = attributes in FIGURE_5 and (
            combination.train_count < MIN_TRAIN or combination.held_out_count < MIN_HELD_OUT
        )
        row = {"success": found / n, "low": low, "high": high, "found": found, "n": n, "figure_5": shown}
        row |= {
            "real_success": real / real_n if real_n and not shown else None,
            "real_found": real,
            "real_n": real_n,
        }
        return {**combination._asdict(), "celeba_count": _everywhere(evidence, attributes), **row}


def _everywhere(evidence: Evidence, attributes: tuple[str, ...]) -> int | None:
    """Images of all of CelebA that carry `attributes`; None where its annotations are not at hand."""
    if evidence.annotations is None:
        return None
    names = evidence.splits["train"].attribute_names
    return int(evidence.annotations[0][:, [names.index(name) for name in attributes]].all(1).sum())


def _mean(x: Iterator[float]) -> float:
    return float(np.mean(list(x)))

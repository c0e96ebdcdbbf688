"""Metrics of obedience: do samples show the attributes that were asked for?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Interval, Metric, Value, around
from pipeline.evaluation.metrics.statistics import (
    balanced_accuracy,
    finite,
    nanmean,
    resample,
    standard_deviation,
    weighted_average_precision,
)


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
                        interval=_interval(value[chosen], drawn[:, chosen]),
                        ceiling=float(nanmean(ceiling[chosen])),
                        floor=float(nanmean(lowest[chosen])),
                        floor_name="requests of other images",
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
                        interval=_interval(lowest[chosen], drawn_floor[:, chosen]),
                        headline=False,
                        over_read_attributes=over_read,
                    ),
                )
            table |= {short: value, f"real_{short}": ceiling, f"shuffled_{short}": lowest}
            table |= _bounds(short, value, drawn)
        yield "per_attribute", _per_attribute(evidence, table)


def _interval(value: np.ndarray, drawn: np.ndarray) -> Interval | None:
    """The 95 % interval of the mean over attributes of scores [A], from resampled ones [R, A].

    It lies around the value. Resampled average precisions are too high, and their percentiles with them.
    """
    means = nanmean(drawn, 1)
    interval = around(float(nanmean(value)), standard_deviation(means[np.isfinite(means)]))
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


def _bounds(name: str, value: np.ndarray, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Ends of the 95 % interval of every attribute's score [A], from resampled ones [R, A]."""
    unknown = (np.nan, np.nan)
    pairs = zip(value[:, None], drawn.T[:, :, None], strict=True)
    ends = np.array([_interval(one, resampled) or unknown for one, resampled in pairs])
    return {f"{name}_low": ends[:, 0], f"{name}_high": ends[:, 1]}


def _per_attribute(evidence: Evidence, table: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Turn columns [A] into one entry per attribute."""
    read = set(evidence.info.attributes)
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(evidence.classifier.attributes):
        numbers = {column: finite(values[i]) for column, values in table.items()}
        found[name] = {**numbers, "read_by_model": name in read}
    return found

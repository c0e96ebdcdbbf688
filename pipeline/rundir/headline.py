"""The six numbers that stand for an evaluation: in the report, a comparison, the terminal and MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.rundir.record import Evaluation


@dataclass(frozen=True)
class Headline:
    """One of the six: a short name that never changes, and the metrics that may stand for it."""

    key: str  # stable: a column in MLflow
    label: str  # for people
    metrics: tuple[str, ...]  # of metrics.json; the first that was measured stands for it


HEADLINES = (
    Headline(
        "distance",
        "distance to real images",
        ("fid_inception_samples", "fd_efficientnet_lite2_samples", "fd_classifier_samples"),
    ),
    Headline("sharpness", "sharpness", ("sharpness_samples",)),
    Headline("obedience", "attributes as asked", ("attribute_balanced_accuracy_read", "attribute_accuracy")),
    Headline("control", "one attribute changed alone", ("attribute_flip",)),
    Headline(
        "diversity", "diversity", ("recall_inception", "recall_efficientnet_lite2", "recall_classifier")
    ),
    Headline("memorised", "copies of training images", ("memorised",)),
)


def standing_for(headline: Headline, evaluations: Iterable[Evaluation]) -> str:
    """Return the metric that stands for a headline in all these evaluations, or "" if there is none."""
    found = list(evaluations)
    for name in headline.metrics:
        if all(evaluation.metrics.get(name) is not None for evaluation in found):
            return name
    return ""

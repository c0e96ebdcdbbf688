"""The metrics of the eval stage. A new one is a class in one of these files, or of its own, and its line in METRICS.

A metric names the parts of the evidence that it `needs`, which all ranks compute together, and is then called on rank 0.
It yields (name, Value), or (name, table) for what is a table of its own.
"""

from __future__ import annotations

from pipeline.evaluation.metrics.alignment import AttributeAgreement, Groups, RareCombinations
from pipeline.evaluation.metrics.base import Metric, Value, collect
from pipeline.evaluation.metrics.distances import (
    FrechetDistance,
    KernelDistance,
    Memorisation,
    PrecisionRecall,
    Sharpness,
)
from pipeline.evaluation.metrics.inference import (
    LatentStructure,
    Likelihood,
    PriorMatch,
    Reconstruction,
    Units,
)

__all__ = ["METRICS", "Metric", "Value", "collect"]

METRICS: dict[str, type[Metric]] = {
    "frechet": FrechetDistance,
    "kernel": KernelDistance,
    "precision_recall": PrecisionRecall,
    "memorisation": Memorisation,
    "sharpness": Sharpness,
    "attributes": AttributeAgreement,
    "groups": Groups,
    "rare": RareCombinations,
    "reconstruction": Reconstruction,
    "likelihood": Likelihood,
    "units": Units,
    "prior_match": PriorMatch,
    "latent_structure": LatentStructure,
}

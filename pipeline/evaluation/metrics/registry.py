"""The metrics of the eval stage. A new metric is a class in this folder and its line in METRICS."""

from __future__ import annotations

from pipeline.evaluation.metrics.alignment import AttributeAgreement
from pipeline.evaluation.metrics.base import Metric
from pipeline.evaluation.metrics.control import AttributeFlip, EditFlip
from pipeline.evaluation.metrics.distances import (
    FrechetDistance,
    KernelDistance,
    Memorisation,
    PrecisionRecall,
    Sharpness,
)
from pipeline.evaluation.metrics.groups import AttributePairs, Groups, RareCombinations
from pipeline.evaluation.metrics.inference import (
    LatentStructure,
    Likelihood,
    PriorMatch,
    Reconstruction,
    Units,
)

METRICS: dict[str, type[Metric]] = {
    "frechet": FrechetDistance,
    "kernel": KernelDistance,
    "precision_recall": PrecisionRecall,
    "memorisation": Memorisation,
    "sharpness": Sharpness,
    "attributes": AttributeAgreement,
    "attribute_pairs": AttributePairs,
    "groups": Groups,
    "rare": RareCombinations,
    "attribute_flip": AttributeFlip,
    "edit_flip": EditFlip,
    "reconstruction": Reconstruction,
    "likelihood": Likelihood,
    "units": Units,
    "prior_match": PriorMatch,
    "latent_structure": LatentStructure,
}

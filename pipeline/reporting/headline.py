"""How a headline number is read: which way is better, what it means, how many images are behind it."""

from __future__ import annotations

import math
from typing import Any

from pipeline.rundir.record import Evaluation

LOWER = (
    "fd_", "fid_", "kid_", "mse", "iw_bits_per_dim", "iw_fitted_bits_per_dim", "group_fd", "memorised", "prior_mmd",
)  # fmt: skip
HIGHER = (
    "attribute_", "rare_", "iw_log_likelihood_nats", "iw_fitted_log_likelihood_nats", "precision_", "recall_", "density_", "coverage_",
    "group_diversity",
)  # fmt: skip
MEANING = {
    "samples": "{distance} of samples to real images",
    "train": "{distance} of training images to real images, beside which a model's is read",
    "recon": "{distance} of reconstructions to real images",
    "attribute_accuracy": "attributes that the classifier finds in samples as asked for, over all attributes",
    "attribute_balanced_accuracy": "the same, but each attribute's two classes weigh equally",
    "attribute_accuracy_read": "attribute_accuracy over the attributes that the model reads",
    "attribute_balanced_accuracy_read": "attribute_balanced_accuracy over the attributes that the model reads",
    "infinite": "{distance} of samples, extrapolated to infinitely many images",
    "attribute_ap": "average precision of the classifier's scores of samples for what was asked for, over all attributes",
    "attribute_ap_read": "attribute_ap over the attributes that the model reads",
    "precision_classifier": "share of samples within reach of real images (k = 3)",
    "recall_classifier": "share of real images within reach of samples (k = 3)",
    "density_classifier": "how many real neighbourhoods a sample falls into, 1 as for real images (k = 5)",
    "coverage_classifier": "share of real images with a sample in their neighbourhood (k = 5)",
    "memorised": "share of samples closer to a training image than 99 % of held-out images are",
    "neighbour_distance_ratio": "median distance to the nearest training image, samples over held-out images",
    "sharpness_samples": "edge energy of samples over that of real images",
    "sharpness_recon": "edge energy of reconstructions over that of real images",
    "group_fd": "Fréchet distance within groups that share an attribute, mean",
    "group_diversity": "spread of features within such a group over that of real images, mean",
    "rare_success": "all attributes of a rare pair or triple found in samples that were asked for them",
    "rare_pairs_success": "rare_success over pairs",
    "rare_triples_success": "rare_success over triples",
    "unit_information_nats": "what the latent units tell about the image, summed",
    "prior_density_gap": "mean log p(z|y) of drawn minus of encoded z, nats; 0 where the prior fits",
    "prior_mmd": "squared maximum mean discrepancy between encoded and drawn z",
    "label_structure_prior": "attributes read from drawn z by a linear rule, balanced accuracy",
    "label_structure_encoded": "attributes read from encoded z by a linear rule, balanced accuracy",
    "flow_curvature_nats": "deviation of the flow's log-determinant that no affine map explains",
    "mse": "squared error of reconstructions, pixels in [0, 1]",
    "sigma": "decoder standard deviation, pixels in [-1, 1]",
    "iw_log_likelihood_nats": "importance-weighted bound on log p(x|y), nats per image",
    "iw_log_likelihood_standard_error": "standard error of the bound, nats per image",
    "iw_fitted_log_likelihood_nats": "the bound with the variance that fits training images best instead of the model's own",
    "iw_fitted_bits_per_dim": "the same in bits per pixel value",
    "iw_bits_per_dim": "importance-weighted bound in bits per pixel value",
    "active_units": "latent units that carry information about the image",
}


def metric_names(evaluations: list[Evaluation]) -> list[str]:
    """Rows or columns of a table of headline numbers: without floors and errors, which stand beside what they belong to."""
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics)
    return [name for name in names if not name.endswith(("_shuffled", "_standard_error"))]


def direction(name: str) -> str:
    """↓ lower is better, ↑ higher is better, or "" where neither is: a reference is not the model's merit."""
    if name.endswith(("_shuffled", "_train", "_p_value")):
        return ""
    return "↓" if name.startswith(LOWER) else "↑" if name.startswith(HIGHER) else ""


def meaning(name: str) -> str:
    """One line on a metric, "" for one that is not known here."""
    if name in MEANING or not name.startswith(LOWER):
        return MEANING.get(name, "")
    distance = "squared kernel distance (KID)" if name.startswith("kid_") else "Fréchet distance"
    return MEANING.get(name.rpartition("_")[2], "").format(distance=distance)


def sample_size(name: str, protocol: dict[str, Any]) -> str:
    """How much was measured, from the protocol."""
    if name.startswith("iw_"):
        return f"{protocol.get('iw_images', '?')} (K = {protocol.get('iw_samples', '?')})"
    if name.startswith("rare_"):
        return f"{protocol.get('rare_samples', '?')} per combination"
    return str(protocol.get("n", "?"))


def number(value: float | None) -> str:
    """Four significant digits without an exponent where that is readable, – for nothing."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds as 1 h 05 min, 3 min 20 s or 4.2 s."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"

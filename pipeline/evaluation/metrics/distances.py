"""Metrics of sets of images: how far samples and reconstructions are from real images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Direction, Metric, Value, around, standard_error
from pipeline.evaluation.metrics.frechet import (
    frechet_distance,
    frechet_extrapolated,
    frechet_jackknife,
    moments,
)
from pipeline.evaluation.metrics.kernel import kernel_distance
from pipeline.evaluation.metrics.neighbours import manifold, nearest
from pipeline.evaluation.metrics.statistics import percentiles, wilson

SHOWN_NEIGHBOURS = 8
K_DENSITY = 5  # neighbours
OTHERS = "other real images"
ONE_IMAGE = "the mean training image, repeated"
MEMORISED_QUANTILE = 0.01  # of the held-out images' own distances
RESAMPLES = 1000


class FrechetDistance(Metric):
    """Fréchet distance of reconstructions and samples to real images, for every kind of features.

    The interval comes from the jackknife. The ceiling of samples is the distance of as many other
    held-out images, so only luck can beat it. Reconstructions are of the very images that they are compared
    with: their ceiling is 0. The floor is the mean training image, repeated.
    `<features>_samples_infinite` extrapolates to infinitely many samples, which removes the bias of a
    finite N; the extrapolation is noisy and may fall below 0. `<features>_train` is the reference
    itself, not the model's merit.
    """

    needs = ("real", "train", "others", "mean_image", "reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield <features>_recon, _samples, _samples_infinite and _train."""
        for name in evidence["real"]:
            real = evidence.rows("real", name)
            there, n = moments(real), len(real)
            best = None
            if name in evidence["others"]:
                best = frechet_distance(moments(evidence.rows("others", name)), there)
            floor = frechet_distance(moments(evidence.rows("mean_image", name)), there)

            for what, part, ceiling, ceiling_name in (
                ("recon", "reconstructions", 0.0, "the images themselves"),
                ("samples", "samples", best, OTHERS),
            ):
                value, error = frechet_jackknife(evidence.rows(part, name), real)
                yield (
                    f"{name}_{what}",
                    Value(
                        value=value,
                        direction="lower",
                        meaning=f"Fréchet distance of {part} to real images",
                        n=n,
                        interval=around(value, error),
                        ceiling=ceiling,
                        floor=floor,
                        ceiling_name=ceiling_name,
                        floor_name=ONE_IMAGE,
                    ),
                )
            yield (
                f"{name}_samples_infinite",
                Value(
                    value=frechet_extrapolated(evidence.rows("samples", name), real),
                    direction="lower",
                    meaning="Fréchet distance of samples to real images, extrapolated to infinite N",
                    n=n,
                    ceiling=0.0,
                    floor=floor,
                    ceiling_name="the true distribution",
                    floor_name=ONE_IMAGE,
                ),
            )
            yield (
                f"{name}_train",
                Value(
                    value=frechet_distance(moments(evidence.rows("train", name)), there),
                    direction="none",
                    meaning="Fréchet distance of training images to real images, a reference",
                    n=n,
                    floor=floor,
                    floor_name=ONE_IMAGE,
                ),
            )


class KernelDistance(Metric):
    """The KID (arXiv 1801.01401) of samples and reconstructions.

    It is unbiased, so it may be negative.

    The value is the mean over random subsets of the images. The ceiling of samples is that of as many
    other held-out images. Subsets are smaller than N, because equal ones would not vary.
    """

    needs = ("real", "others", "reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield kid_<features>_samples and _recon; nothing for fewer than two images."""
        settings = evidence.settings
        few = max(1, settings.kid_subsets // 5)
        for metric in evidence["real"]:
            real = evidence.rows("real", metric)
            n = len(real)
            if n < 2:
                continue
            size = kernel_subset(settings.kid_subset_size, n)
            best = None
            if len(evidence["others"].get(metric, ())) >= size:
                best, _ = kernel_distance(evidence.rows("others", metric), real, few, size)

            for what, part, subsets, ceiling in (
                ("samples", "samples", settings.kid_subsets, best),
                ("recon", "reconstructions", few, None),
            ):
                mean, deviation = kernel_distance(evidence.rows(part, metric), real, subsets, size)
                error = kernel_error(deviation, subsets, size, n)
                meaning = (
                    f"squared kernel distance (KID) of {part} to real images, mean over subsets of {size}"
                )
                yield (
                    f"kid_{short_name(metric)}_{what}",
                    Value(
                        value=mean,
                        direction="lower",
                        meaning=meaning,
                        n=n,
                        interval=around(mean, error),
                        ceiling=ceiling,
                        ceiling_name=OTHERS,
                    ),
                )


def kernel_subset(wanted: int, n: int) -> int:
    """Images of one subset: as many as wanted, or half of the `n` images if these are not more."""
    return wanted if wanted < n else max(2, n // 2)


def kernel_error(deviation: float, subsets: int, size: int, n: int) -> float:
    """Standard error of the KID of `n` images; nan if the subsets do not vary.

    Subsets are drawn without replacement, so their variance is s^2 (1/size - 1/n); all n images
    have s^2 / n. The mean over few subsets adds their own luck.
    """
    if subsets < 2 or size >= n:
        return math.nan
    return deviation * math.sqrt(size / (n - size) + 1 / subsets)


class PrecisionRecall(Metric):
    """Precision and recall (k = 3), density and coverage (k = 5) of samples.

    The ceiling takes as many other held-out images as samples. Precision and density may exceed it: samples
    of a timid model stay where real images are dense. The floor of recall and coverage is one image,
    repeated, which reaches next to nothing.
    """

    needs = ("real", "others", "samples")
    about: dict[str, str] = {
        "precision": "share of samples within reach of real images (k = 3)",
        "recall": "share of real images within reach of samples (k = 3)",
        "density": f"real neighbourhoods that hold a sample, 1 as for real images (k = {K_DENSITY})",
        "coverage": f"share of real images with a sample in their neighbourhood (k = {K_DENSITY})",
    }

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield precision_, recall_, density_ and coverage_<features>; nothing for few images."""
        for metric in evidence["real"]:
            real = evidence.rows("real", metric)
            if len(real) // 2 <= K_DENSITY:
                continue
            found = manifold(evidence.rows("samples", metric), real, k_density=K_DENSITY)
            best = None
            if metric in evidence["others"]:
                best = manifold(evidence.rows("others", metric), real, k_density=K_DENSITY)._asdict()
            for what, value in found._asdict().items():
                interval = None
                if what != "density":  # not a share
                    interval = wilson(round(value * len(real)), len(real))
                yield (
                    f"{what}_{short_name(metric)}",
                    Value(
                        value=value,
                        direction="higher",
                        meaning=self.about[what],
                        n=len(real),
                        interval=interval,
                        ceiling=best[what] if best else None,
                        floor=0.0 if what in ("recall", "coverage") else None,
                        ceiling_name=OTHERS,
                        floor_name="one image, repeated",
                    ),
                )


class Memorisation(Metric):
    """Share of samples that are closer to a training image than 99 % of real held-out images are.

    Distances are between features of a network that did not see these images if there is one, otherwise
    between the classifier's. Real held-out images are at 0.01 by
    construction, which is the ceiling. A model may be below it: blurred samples are far from every
    image. It may also be above it without a copy: typical samples are near to many images.
    """

    needs = ("real", "samples", "memory")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield memorised, neighbour_distance_ratio and the table neighbours."""
        (metric,) = evidence["memory"]
        memory = evidence.rows("memory", metric)
        distances, indices = nearest(evidence.rows("samples", metric), memory, 1)
        distance, image = distances[:, 0], indices[:, 0]
        real = nearest(evidence.rows("real", metric), memory, 1)[0][:, 0]

        close = distance < np.quantile(real, MEMORISED_QUANTILE)
        yield (
            "memorised",
            Value(
                value=float(close.mean()),
                direction="lower",
                meaning="share of samples closer to a training image than 99 % of held-out images are"
                f" ({short_name(metric)} features)",
                n=len(close),
                interval=_memorised_interval(distance, real, evidence.settings.seed),
                ceiling=MEMORISED_QUANTILE,
                floor=1.0,
                ceiling_name="held-out images",
                floor_name="every sample a copy",
            ),
        )
        typical = float(np.median(real))
        yield (
            "neighbour_distance_ratio",
            Value(
                value=float(np.median(distance)) / typical if typical else math.nan,
                direction="none",
                meaning="median distance to the nearest training image, samples over held-out images",
                n=len(distance),
                ceiling=1.0,
            ),
        )
        closest = np.argsort(distance, kind="stable")[:SHOWN_NEIGHBOURS]
        table = [
            {"sample": int(i), "training_image": int(image[i]), "distance": float(distance[i])}
            for i in closest
        ]
        yield "neighbours", table


def _memorised_interval(distance: np.ndarray, real: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Bootstrap over samples and over held-out images, since these set the limit: 1 % of them are few.

    The interval holds Wilson's too: resampling none of N samples finds none for ever.
    """
    rng = np.random.default_rng(seed)
    shares = []
    for _ in range(RESAMPLES):
        limit = np.quantile(rng.choice(real, len(real)), MEMORISED_QUANTILE)
        shares.append((rng.choice(distance, len(distance)) < limit).mean())
    interval = percentiles(np.array(shares))
    if interval is None:
        return None
    close = int((distance < np.quantile(real, MEMORISED_QUANTILE)).sum())
    low, high = wilson(close, len(distance))
    return min(interval[0], low), max(interval[1], high)


class Sharpness(Metric):
    """Edge energy over that of real images: blur is below 1, noise above."""

    needs = ("reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield sharpness_recon and sharpness_samples."""
        real = evidence["reconstructions"]["real_edges"]
        direction: Direction = "none"  # too sharp is as wrong as too blurred
        for what, part in (("recon", "reconstructions"), ("samples", "samples")):
            edges = evidence[part]["edges"]
            scale = float(real.mean()) or math.nan
            ratio = float(edges.mean()) / scale
            error = standard_error(edges - ratio * real) / scale  # of a ratio of two means
            yield (
                f"sharpness_{what}",
                Value(
                    value=ratio,
                    direction=direction,
                    meaning=f"edge energy of {part} over that of real images",
                    n=len(edges),
                    interval=around(ratio, error),
                    ceiling=1.0,
                    floor=0.0,
                    floor_name="a flat image",
                ),
            )


def short_name(metric: str) -> str:
    """Name of the features without the distance: fd_classifier -> classifier."""
    return metric.removeprefix("fd_").removeprefix("fid_")

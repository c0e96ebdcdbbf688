"""Metrics of sets of images: how far samples and reconstructions are from real images, in features or in pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.evaluation import vision
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric, Value, around, normal_interval
from pipeline.evaluation.metrics.neighbours import manifold, nearest
from pipeline.evaluation.metrics.statistics import (
    frechet_distance,
    frechet_extrapolated,
    frechet_jackknife,
    moments,
    wilson,
)

SHOWN_NEIGHBOURS = 8
K_DENSITY = 5  # neighbours


class FrechetDistance(Metric):
    """Distance of reconstructions and of samples to the real images, for each kind of features; interval by the jackknife.

    Ceiling: one half of the real images against the other, so N/2 each; floor: the mean training image over and over.
    Training images have a distance of their own: a classifier's features know them, and they may come from other sources.
    <features>_samples_infinite: of samples, extrapolated to infinitely many images, which takes the bias of a finite N away.
    """

    needs = ("real", "train", "mean_image", "reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield <features>_recon, _samples, _samples_infinite and _train."""
        for name, real in evidence.real.items():
            halves = frechet_distance(moments(real[::2]), moments(real[1::2]))
            floor = frechet_distance(moments(evidence.mean_image[name]), moments(real))
            for what, others in (("recon", evidence.reconstructions), ("samples", evidence.samples)):
                value, error = frechet_jackknife(others[name], real)
                yield f"{name}_{what}", Value(value, around(value, error), halves, floor)
            ceiling = frechet_extrapolated(real[::2], real[1::2])
            yield (
                f"{name}_samples_infinite",
                Value(frechet_extrapolated(evidence.samples[name], real), None, ceiling, floor),
            )
            yield (
                f"{name}_train",
                Value(frechet_distance(moments(evidence.train[name]), moments(real)), None, halves, floor),
            )


class KernelDistance(Metric):
    """torch-fidelity's KID (arXiv 1801.01401) of samples and reconstructions; unbiased, so it may fall below 0.

    Ceiling: one half of the real images against the other. The interval is that of the mean over subsets, scaled to N.
    """

    needs = ("real", "reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield kid_<features>_samples and _recon."""
        settings = evidence.settings
        for metric, real in evidence.real.items():
            name = metric.removeprefix("fd_").removeprefix("fid_")
            size = min(settings.kid_subset_size, len(real) // 2)
            ceiling, _ = vision.kernel_distance(
                real[::2], real[1::2], max(1, settings.kid_subsets // 5), size
            )
            for what, others in (("samples", evidence.samples), ("recon", evidence.reconstructions)):
                subsets = settings.kid_subsets if what == "samples" else max(1, settings.kid_subsets // 5)
                mean, deviation = vision.kernel_distance(
                    others[metric], real, subsets, settings.kid_subset_size
                )
                error = deviation * (min(settings.kid_subset_size, len(real)) / len(real)) ** 0.5
                yield f"kid_{name}_{what}", Value(mean, around(mean, error), ceiling)


class PrecisionRecall(Metric):
    """Precision and recall (k = 3), density and coverage (k = 5) of samples; ceiling: one half of the real images as the other's samples.

    The ceiling has N/2 images in each set: compare precision and density with it, recall and coverage grow with N.
    """

    needs = ("real", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield precision_, recall_, density_ and coverage_<features>; nothing for fewer images than have neighbours in each half."""
        for metric, real in evidence.real.items():
            if len(real) // 2 <= K_DENSITY:
                continue
            name = metric.removeprefix("fd_").removeprefix("fid_")
            found, halves = (
                manifold(evidence.samples[metric], real, k_density=K_DENSITY),
                manifold(real[::2], real[1::2], k_density=K_DENSITY),
            )
            for what, value in found._asdict().items():
                interval = None if what == "density" else wilson(round(value * len(real)), len(real))
                yield f"{what}_{name}", Value(value, interval, getattr(halves, what))


class Memorisation(Metric):
    """Share of samples closer to a training image than 99 % of real held-out images are to theirs, on the first extractor's features.

    A model that learnt no image by heart stays near 0.01 or below; real images are at 0.01 by construction (the ceiling).
    """

    needs = ("real", "samples", "memory")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield memorised, neighbour_distance_ratio (medians, samples over real) and the table neighbours of the closest samples."""
        ((metric, memory),) = evidence.memory.items()
        distance, image = (x[:, 0] for x in nearest(evidence.samples[metric], memory, 1))
        real = nearest(evidence.real[metric], memory, 1)[0][:, 0]
        close = distance < np.quantile(real, 0.01)
        yield "memorised", Value(close.mean(), wilson(int(close.sum()), len(close)), 0.01)
        yield "neighbour_distance_ratio", Value(float(np.median(distance) / np.median(real)), None, 1.0)
        shown = np.argsort(distance, kind="stable")[:SHOWN_NEIGHBOURS]
        columns = {"sample": shown, "training_image": image[shown], "distance": distance[shown]}
        yield (
            "neighbours",
            [
                dict(zip(columns, (int(s), int(t), float(d)), strict=True))
                for s, t, d in zip(*columns.values(), strict=True)
            ],
        )


class Sharpness(Metric):
    """Mean squared Laplacian of grey images over that of the real ones: below 1 is blurred, above 1 is noise or harder edges."""

    needs = ("reconstructions", "samples")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield sharpness_recon and sharpness_samples."""
        real = evidence.reconstructions["real_edges"].mean()
        for what, rows in (
            ("recon", evidence.reconstructions["edges"]),
            ("samples", evidence.samples["edges"]),
        ):
            yield f"sharpness_{what}", Value(rows.mean() / real, normal_interval(rows / real), 1.0, 0.0)

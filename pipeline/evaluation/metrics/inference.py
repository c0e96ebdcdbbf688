"""Metrics of the model as a density: reconstruction, likelihood and the latent space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvae.distributions import DiagonalGaussian
from cvae.losses import active_units, bits_per_dim
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric, Value, normal_interval, standard_error
from pipeline.evaluation.metrics.neighbours import mmd
from pipeline.evaluation.metrics.statistics import finite
from pipeline.evaluation.metrics.structure import label_accuracy, unexplained_deviation
from pipeline.runtime.split import spread

MMD_IMAGES = 1500  # at most; its cost grows with the square
VARIANCES = {"iw": "the model's own variance", "iw_fitted": "the variance that fits training images best"}


class Reconstruction(Metric):
    """Squared error of reconstructions; the floor is that of the mean training image."""

    needs = ("mean_image", "reconstructions")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield mse on the [0, 1] scale and sigma on the [-1, 1] scale."""
        mse = evidence["reconstructions"]["mse"]
        yield (
            "mse",
            Value(
                value=float(mse.mean()),
                direction="lower",
                meaning="squared error of reconstructions, pixels in [0, 1]",
                n=len(mse),
                interval=normal_interval(mse),
                floor=float(evidence["mean_image"]["mse"].mean()),
                floor_name="the mean training image",
            ),
        )
        yield (
            "sigma",
            Value(
                value=math.sqrt(evidence.info.s2),
                direction="none",
                meaning="decoder standard deviation, pixels in [-1, 1]",
                n=len(mse),
            ),
        )


class Likelihood(Metric):
    """Importance-weighted bound on log p(x|y) with K samples per image (arXiv 1509.00519)."""

    needs = ("log_likelihood",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield the bound in nats per image and in bits per dimension, and its standard error."""
        pixels, k = evidence.model.pixels, evidence.settings.iw_samples
        for name, rows in evidence["log_likelihood"].items():
            nats, n = rows.astype(np.float64), len(rows)
            if n == 0:
                continue
            bound = f"importance-weighted bound (K = {k}) on log p(x|y) with {VARIANCES[name]}"
            interval = bits = normal_interval(nats)
            if interval is not None:
                bits = bits_per_dim(-interval[1], pixels), bits_per_dim(-interval[0], pixels)
            yield (
                f"{name}_log_likelihood_nats",
                Value(
                    value=float(nats.mean()),
                    direction="higher",
                    meaning=bound,
                    unit="nats per image",
                    n=n,
                    interval=interval,
                ),
            )
            yield (
                f"{name}_log_likelihood_standard_error",
                Value(
                    value=standard_error(nats),
                    direction="none",
                    meaning="standard error of the bound",
                    unit="nats per image",
                    n=n,
                    headline=False,
                ),
            )
            yield (
                f"{name}_bits_per_dim",
                Value(
                    value=bits_per_dim(-float(nats.mean()), pixels),
                    direction="lower",
                    meaning=bound,
                    unit="bits per pixel value",
                    n=n,
                    interval=bits,
                ),
            )


class Units(Metric):
    """Latent units: their KL to the prior, their information, and whether they are active.

    `information` is the mean KL(q(z_d|x,y) || N(m_d, v_d)) to the Gaussian with the moments of all
    q together, which every prior has. `kl` is KL(q || p(z|y)) in this unit. It is null under a
    flow, whose KL is no sum over units.
    """

    needs = ("reconstructions",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield active_units, unit_information_nats and the table units."""
        rows = evidence["reconstructions"]
        mean = torch.from_numpy(rows["mean"]).double()
        variance = torch.from_numpy(rows["variance"]).double()
        n = len(mean)
        yield (
            "active_units",
            Value(
                value=active_units(n, mean.sum(0), mean.square().sum(0), variance.sum(0)),
                direction="none",
                meaning="latent units that carry information about the image",
                unit="units",
                n=n,
                ceiling=evidence.model.z_dim,
                ceiling_name="all units",
            ),
        )
        total = variance.mean(0) + mean.var(0, unbiased=False)
        information = 0.5 * (total.log() - variance.log().mean(0))
        yield (
            "unit_information_nats",
            Value(
                value=float(information.sum()),
                direction="none",
                meaning="what the latent units tell about the image, summed over units",
                unit="nats",
                n=n,
            ),
        )
        kl = self._kl(evidence, mean, variance)
        nats = [None] * len(information) if kl is None else [finite(x) for x in kl.tolist()]
        informed = [finite(x) for x in information.tolist()]
        yield "units", [{"information": i, "kl": k} for i, k in zip(informed, nats, strict=True)]

    @staticmethod
    @torch.no_grad()
    def _kl(evidence: Evidence, mean: Tensor, variance: Tensor) -> Tensor | None:
        """Mean KL of every unit [D], or None under a flow."""
        total = torch.zeros(mean.shape[1], dtype=torch.float64)
        for start in range(0, len(mean), evidence.settings.block):
            part = slice(start, start + evidence.settings.block)
            prior = evidence.model.prior(evidence.condition(evidence.requested[part]))
            kl = prior.kl_per_unit(DiagonalGaussian(mean[part], 0.5 * variance[part].log()))
            if kl is None:
                return None
            total += kl.sum(0)
        return total / len(mean)


class PriorMatch(Metric):
    """Is the average of q(z|x,y) over images the prior p(z|y)?

    prior_density_gap is the mean log p(z|y) of drawn z minus that of encoded z. It is 0 if they
    match, and large if the decoder is sampled in places that it never saw. prior_mmd is the squared
    maximum mean discrepancy of both, with the p-value of a permutation test.
    """

    needs = ("latents",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield prior_density_drawn, _encoded and _gap, prior_mmd and prior_mmd_p_value."""
        rows = {name: x.astype(np.float64) for name, x in evidence["latents"].items()}
        gap = rows["log_p_drawn"] - rows["log_p_encoded"]
        for what, nats, meaning in (
            ("drawn", rows["log_p_drawn"], "mean log p(z|y) of z drawn from the prior"),
            ("encoded", rows["log_p_encoded"], "mean log p(z|y) of encoded z"),
            ("gap", gap, "mean log p(z|y) of drawn minus encoded z; 0 if the prior fits"),
        ):
            yield (
                f"prior_density_{what}",
                Value(
                    value=float(nats.mean()),
                    direction="none",
                    meaning=meaning,
                    unit="nats",
                    n=len(nats),
                    interval=normal_interval(nats),
                    ceiling=0.0 if what == "gap" else None,
                    ceiling_name="a prior that fits",
                ),
            )
        some = spread(min(MMD_IMAGES, len(gap)), len(gap))
        if len(some) < 2:
            return
        value, p = mmd(rows["encoded"][some], rows["drawn"][some], evidence.settings.seed)
        yield (
            "prior_mmd",
            Value(
                value=value,
                direction="lower",
                meaning="squared maximum mean discrepancy between encoded and drawn z",
                n=len(some),
                ceiling=0.0,
                ceiling_name="a prior that fits",
            ),
        )
        yield (
            "prior_mmd_p_value",
            Value(
                value=p,
                direction="none",
                meaning="p-value of prior_mmd: small if encoded and drawn z differ",
                n=len(some),
            ),
        )


class LatentStructure(Metric):
    """Does p(z|y) depend on the labels, and is it more than a moved and rescaled Gaussian?

    label_structure_prior and _encoded are the balanced accuracy with which a linear rule reads an
    attribute from z, fitted on half of the images and measured on the other, mean over attributes;
    0.5 knows nothing. flow_curvature_nats is the standard deviation of log|det df/dz| over drawn z
    after a linear fit to y. It is 0 for every affine map of a Gaussian. It is left out without a flow.
    """

    needs = ("latents",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield label_structure_prior, label_structure_encoded and flow_curvature_nats."""
        labels = evidence.requested.astype(bool)
        for name, which in (("prior", "drawn"), ("encoded", "encoded")):
            value, interval = label_accuracy(evidence["latents"][which], labels)
            yield (
                f"label_structure_{name}",
                Value(
                    value=value,
                    direction="none",
                    meaning=f"balanced accuracy of reading attributes from {which} z by a linear rule",
                    n=len(labels) // 2,
                    interval=interval,
                    ceiling=1.0,
                    floor=0.5,
                    ceiling_name="always right",
                    floor_name="guessing",
                ),
            )
        log_det = evidence["latents"]["log_det"].astype(np.float64)
        if not log_det.any():  # no flow of this kind, so there is no map to judge
            return
        yield (
            "flow_curvature_nats",
            Value(
                value=unexplained_deviation(log_det, labels),
                direction="none",
                meaning="deviation of the flow's log-determinant that no affine map explains",
                unit="nats",
                n=len(log_det),
            ),
        )

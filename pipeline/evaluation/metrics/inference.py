"""Metrics of the model as a density: reconstruction, likelihood, and what its latent space is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cvae.distributions import DiagonalGaussian, gaussian_kl
from cvae.losses import active_units, bits_per_dim
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric, Value, finite, normal_interval, standard_error
from pipeline.evaluation.metrics.neighbours import mmd
from pipeline.evaluation.metrics.structure import label_accuracy

MMD_IMAGES = 1500


class Reconstruction(Metric):
    """Squared error of reconstructions on the [0, 1] scale; floor: the mean training image."""

    needs = ("mean_image", "reconstructions")

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield mse and sigma, the decoder's standard deviation on the [-1, 1] scale."""
        mse = evidence.reconstructions["mse"]
        yield "mse", Value(mse.mean(), normal_interval(mse), None, evidence.mean_image["mse"].mean())
        yield "sigma", Value(math.sqrt(evidence.info.s2))


class Likelihood(Metric):
    """Importance-weighted bound on log p(x|y) with K samples per image."""

    needs = ("log_likelihood",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield the bound in nats per image, its standard error, and in bits per dimension (lower is better)."""
        for name, rows in evidence.log_likelihood.items():
            nats = rows.astype(np.float64)
            if not len(nats):
                continue
            interval = normal_interval(nats)
            low, high = (bits_per_dim(-end, evidence.model.pixels) for end in reversed(interval))
            yield f"{name}_log_likelihood_nats", Value(nats.mean(), interval)
            yield f"{name}_log_likelihood_standard_error", Value(standard_error(nats))
            yield (
                f"{name}_bits_per_dim",
                Value(bits_per_dim(-nats.mean(), evidence.model.pixels), (low, high)),
            )


class Units(Metric):
    """Each latent unit: the KL from q to the prior in it, what it tells about the image, and whether its posterior mean moves at all.

    `information`: mean KL(q(z_d|x,y) || N(m_d, v_d)) to the Gaussian with the moments of all q together, defined for every prior.
    `kl`: KL(q || p(z|y)) in this unit; null under a flow, whose KL is not a sum over units.
    """

    needs = ("reconstructions",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield active_units (at most z_dim), unit_information_nats (the sum over units) and the table units."""
        mean, variance = (
            torch.from_numpy(evidence.reconstructions[name]).double() for name in ("mean", "variance")
        )
        active = active_units(len(mean), mean.sum(0), mean.square().sum(0), variance.sum(0))
        total = variance.mean(0) + mean.var(0, unbiased=False)
        information = 0.5 * (total.log() - variance.log().mean(0))
        yield "active_units", Value(active, None, evidence.model.z_dim)
        yield "unit_information_nats", Value(float(information.sum()))
        kl = self._kl(evidence, mean, variance)
        table = [
            {"information": finite(float(i)), "kl": None if kl is None else finite(float(kl[d]))}
            for d, i in enumerate(information)
        ]
        yield "units", table

    @staticmethod
    @torch.no_grad()
    def _kl(evidence: Evidence, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor | None:
        total = torch.zeros(mean.shape[1], dtype=torch.float64)
        for start in range(0, len(mean), evidence.settings.block):
            part = slice(start, start + evidence.settings.block)
            prior = evidence.model.prior(
                torch.from_numpy(evidence.requested[part]).to(evidence.ranks.device, torch.float32)
            )
            if not isinstance(prior, DiagonalGaussian):
                return None
            q = DiagonalGaussian(mean[part, :, None], 0.5 * variance[part, :, None].log())
            p = DiagonalGaussian(*(t.cpu().double()[..., None] for t in prior))
            total += gaussian_kl(q, p).sum(0)
        return total / len(mean)


class PriorMatch(Metric):
    """Whether what the encoder produces is what the prior expects: is the average of q(z|x,y) over images p(z|y)?

    prior_density_gap: mean log p(z|y) of z drawn from p(z|y) minus that of encoded z; 0 where they match, large where the decoder is
    sampled in places that it never saw. prior_mmd: squared maximum mean discrepancy between both, with a permutation test.
    """

    needs = ("latents",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield prior_density_drawn, prior_density_encoded, prior_density_gap, prior_mmd and prior_mmd_p_value."""
        rows = {name: x.astype(np.float64) for name, x in evidence.latents.items()}
        for who in ("drawn", "encoded"):
            yield (
                f"prior_density_{who}",
                Value(rows[f"log_p_{who}"].mean(), normal_interval(rows[f"log_p_{who}"])),
            )
        gap = rows["log_p_drawn"] - rows["log_p_encoded"]
        yield "prior_density_gap", Value(gap.mean(), normal_interval(gap), 0.0)
        some = np.arange(min(MMD_IMAGES, len(gap))) * len(gap) // min(MMD_IMAGES, len(gap))
        value, p = mmd(rows["encoded"][some], rows["drawn"][some], evidence.settings.seed)
        yield "prior_mmd", Value(value, None, 0.0)
        yield "prior_mmd_p_value", Value(p)


class LatentStructure(Metric):
    """Whether p(z|y) depends on the labels, and is more than a Gaussian moved and rescaled: the digest's check of the learned prior.

    label_structure_prior and _encoded: balanced accuracy with which an attribute is read from z by a linear rule fitted on half of the
    images and measured on the other, mean over attributes; 0.5 knows nothing. flow_curvature_nats: standard deviation of
    log|det df/dz| over z drawn from the prior, the effect of y removed by a linear fit; 0 for every affine map of a Gaussian.
    """

    needs = ("latents",)

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Value]]:
        """Yield label_structure_prior, label_structure_encoded and flow_curvature_nats."""
        labels = evidence.requested.astype(bool)
        for name, who in (("prior", "drawn"), ("encoded", "encoded")):
            value, interval = label_accuracy(evidence.latents[who], labels)
            yield f"label_structure_{name}", Value(value, interval, 1.0, 0.5)
        y = np.column_stack([np.ones(len(labels)), labels])
        log_det = evidence.latents["log_det"].astype(np.float64)
        rest = log_det - y @ np.linalg.lstsq(y, log_det, rcond=None)[0]
        yield "flow_curvature_nats", Value(float(rest.std()))

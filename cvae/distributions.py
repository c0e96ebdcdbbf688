"""Distributions over z, with `log_prob` and `sample` in one object.

So training cannot fit another prior than the one that samples are drawn from.

A new kind of distribution implements `log_prob` and `sample`. It overrides `kl_from` if its KL
divergence is analytic, and `log_det` if it transforms a simpler density.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.priors.flow import Flow


class Divergence(NamedTuple):
    """KL(q || p) and the log-determinant that its computation met, both [B], nats."""

    kl: Tensor
    log_det: Tensor  # log|det df/dz| at z; 0 without a flow


class Distribution(ABC):
    """A batch of distributions p of z [B, D], one for each image."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density at z [B, D] -> [B], nats."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise [B, D] into samples z [B, D]."""

    def to_noise(self, z: Tensor) -> Tensor:
        """Return the noise [B, D] that `sample` turns into z [B, D]: the inverse of `sample`.

        Edits of images need it; a kind without it raises ValueError.
        """
        raise ValueError(f"a prior of the kind {type(self).__name__} cannot carry a code back to noise")

    def log_det(self, z: Tensor) -> Tensor:
        """Return log|det df/dz| [B] at z [B, D] of the map f to the base density; 0 without one."""
        return z.new_zeros(z.shape[:-1])

    def kl_from(self, q: DiagonalGaussian, z: Tensor) -> Divergence:
        """Estimate KL(q || p) from one sample z ~ q [B, D] with q's analytic entropy.

        KL(q || p) = -H[q] - E_q[log p(z)].
        """
        return Divergence(-q.entropy() - self.log_prob(z), self.log_det(z))

    def kl_per_unit(self, q: DiagonalGaussian) -> Tensor | None:
        """Return the analytic KL(q || p) of each latent unit [B, D], nats, or None."""
        return None

    def fit_loss(self, z: Tensor, noise: Tensor) -> Tensor:
        """Return the loss [B] by which a prior is fitted to codes z [B, D]: by default -log p(z), nats.

        `noise` [B, F] is standard normal; `fit_noise` of the prior says F, 0 for this default.
        """
        with torch.autocast(z.device.type, enabled=False):
            return -self.log_prob(z)

    def guided(self, unconditional: Distribution, strength: float) -> Distribution:
        """Return a distribution that follows the condition `strength` times as closely.

        Raises ValueError: only a prior with a velocity can be guided.
        """
        raise ValueError(
            f"eval.guidance: a prior of the kind {type(self).__name__} cannot be guided; set eval.guidance=1"
            " or refine the run with refine.prior.name=flow_matching"
        )


@dataclass(frozen=True)
class DiagonalGaussian(Distribution):
    """N(mean, exp(log_std)^2) with independent units."""

    mean: Tensor  # [B, D]
    log_std: Tensor  # [B, D]

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density at z [..., B, D] -> [..., B], nats."""
        standard = (z - self.mean) * (-self.log_std).exp()
        return (-0.5 * standard.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise (the reparameterisation trick)."""
        return self.mean + self.log_std.exp() * noise

    def to_noise(self, z: Tensor) -> Tensor:
        """Return (z - mean) / std."""
        return (z - self.mean) * (-self.log_std).exp()

    def entropy(self) -> Tensor:
        """Return H = sum_d ln std_d + (1 + ln 2 pi)/2 -> [B], nats."""
        return (self.log_std + 0.5 * (1 + math.log(2 * math.pi))).sum(-1)

    def kl_from(self, q: DiagonalGaussian, z: Tensor) -> Divergence:
        """Return the analytic KL(q || p); z only gives its shape."""
        return Divergence(self.kl_per_unit(q).sum(-1), self.log_det(z))

    def kl_per_unit(self, q: DiagonalGaussian) -> Tensor:
        """Return KL(q || p) of each unit [B, D], nats, in q's dtype and on q's device.

        ln(std_p / std_q) + (std_q^2 / std_p^2 + (mean_q - mean_p)^2 / std_p^2 - 1) / 2
        """
        mean = self.mean.to(q.mean)
        log_std = self.log_std.to(q.log_std)
        ratio = (2 * (q.log_std - log_std)).exp()
        distance = ((q.mean - mean) * (-log_std).exp()).square()
        return log_std - q.log_std + 0.5 * (ratio + distance - 1)


@dataclass(frozen=True)
class FlowDistribution(Distribution):
    """The density of z for which u = f(z) follows `base`; sampling goes through f^-1.

    log p(z) = log base(f(z)) + log|det df/dz|
    """

    base: DiagonalGaussian
    flow: Flow
    e: Tensor  # [B, E], the condition that the flow sees

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density at z [B, D] -> [B], nats."""
        u, log_det = self.flow(z, self.e)
        return self.base.log_prob(u) + log_det

    def sample(self, noise: Tensor) -> Tensor:
        """Return z = f^-1(u) with u = mu_p + sigma_p * noise."""
        return self.flow.inverse(self.base.sample(noise), self.e)

    def to_noise(self, z: Tensor) -> Tensor:
        """Return (f(z) - mu_p) / sigma_p."""
        u, _ = self.flow(z, self.e)
        return self.base.to_noise(u)

    def log_det(self, z: Tensor) -> Tensor:
        """Return log|det df/dz| [B] at z [B, D]."""
        _, log_det = self.flow(z, self.e)
        return log_det

    def kl_from(self, q: DiagonalGaussian, z: Tensor) -> Divergence:
        """Estimate KL(q || p) as the base class does, with one pass of the flow.

        sum_d [ln sigma_p - ln sigma_q - 1/2 + (f(z) - mu_p)^2 / (2 sigma_p^2)] - log|det df/dz|
        """
        u, log_det = self.flow(z, self.e)
        standard = (u - self.base.mean) * (-self.base.log_std).exp()
        quadratic = 0.5 * (standard.square().sum(-1) - z.shape[-1])
        return Divergence(quadratic + (self.base.log_std - q.log_std).sum(-1) - log_det, log_det)

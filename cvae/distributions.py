"""Conditional distributions over z: one object has both `log_prob` and `sample`, so training and sampling cannot differ."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cvae.flow import Flow


class Distribution(Protocol):
    """A distribution of z [B, D], one for each image."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density at z [B, D] -> [B], nats."""

    def sample(self, noise: Tensor) -> Tensor:
        """Standard normal noise [B, D] -> z [B, D]."""


class DiagonalGaussian(NamedTuple):
    """N(mean, exp(log_std)^2), both [B, D]."""

    mean: Tensor
    log_std: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density at z [..., B, D] -> [..., B], nats."""
        standard = (z - self.mean) * (-self.log_std).exp()
        return (-0.5 * standard.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise (the reparameterisation trick)."""
        return self.mean + self.log_std.exp() * noise

    def entropy(self) -> Tensor:
        """H = sum_d ln std + (1 + ln 2 pi)/2 -> [B], nats."""
        return (self.log_std + 0.5 * (1 + math.log(2 * math.pi))).sum(-1)


class FlowDistribution(NamedTuple):
    """Density of z where u = f(z) follows `base`: log p(z) = log base(f(z)) + log|det df/dz|; sampling goes through f^-1."""

    base: DiagonalGaussian
    flow: Flow
    e: Tensor  # [B, E] condition seen by the flow

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density at z [B, D] -> [B], nats."""
        u, log_det = self.flow(z, self.e)
        return self.base.log_prob(u) + log_det

    def sample(self, noise: Tensor) -> Tensor:
        """u = mu_p + sigma_p * noise, then z = f^-1(u)."""
        return self.flow.inverse(self.base.sample(noise), self.e)


def kl_divergence(q: DiagonalGaussian, p: Distribution, z: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) [B] and log|det df/dz| [B] (0 without a flow), nats; one sample z ~ q [B, D] for what is not analytic."""
    if isinstance(p, FlowDistribution):
        return flow_kl(q, p, z)
    assert isinstance(p, DiagonalGaussian)
    kl = gaussian_kl(q, p)
    return kl, torch.zeros_like(kl)


def gaussian_kl(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
    """KL(q || p) of diagonal Gaussians, analytic -> [B], nats."""
    ratio = (2 * (q.log_std - p.log_std)).exp()
    distance = ((q.mean - p.mean) * (-p.log_std).exp()).square()
    return (p.log_std - q.log_std + 0.5 * (ratio + distance - 1)).sum(-1)


def flow_kl(q: DiagonalGaussian, p: FlowDistribution, z: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) with the entropy of q analytic and one sample z ~ q for the rest -> KL [B], log|det df/dz| [B], nats.

    sum_d [ln sigma_p - ln sigma_q - 1/2 + (f(z) - mu_p)^2 / (2 sigma_p^2)] - log|det df/dz|
    """
    u, log_det = p.flow(z, p.e)
    return -q.entropy() - p.base.log_prob(u) - log_det, log_det

"""Conditional priors p(z|y): each maps e(y) [B, E] to a distribution of z [B, D].

A new prior needs its class and its line in `PRIORS`. It is built from (config, n_condition) and
returns a `Distribution`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.distributions import DiagonalGaussian, Distribution, FlowDistribution
from cvae.nets.layers import full_precision, mlp, soft_floor, zeroed
from cvae.nets.shapes import require_embeddings
from cvae.priors.flow import Flow
from cvae.priors.flow_matching import VELOCITIES, Condition, FlowMatchingDistribution


class AttributeConv(nn.Module):
    """The paper's encoder p: two 1-d convolutions along the attribute embeddings and a linear layer."""

    def __init__(self, n_condition: int, width: int, hidden: int, n_out: int) -> None:
        super().__init__()
        self.width = width
        self.convs = nn.Sequential(
            nn.Conv1d(width, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(hidden, width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.out = zeroed(nn.Linear(n_condition, n_out))

    def forward(self, e: Tensor) -> Tensor:
        """Map e [B, A * width] to [B, n_out]."""
        embeddings = e.unflatten(1, (-1, self.width)).transpose(1, 2)
        return self.out(self.convs(embeddings))


def prior_net(config: ModelConfig, n_condition: int) -> nn.Module:
    """Return the network of mu_p(y) and ln sigma_p(y), e [B, E] -> [B, 2D]; it starts at N(0, I).

    Raises ValueError if `conv1d` has no attribute embeddings to run along.
    """
    if config.prior.net == "mlp":
        return mlp(n_condition, config.prior.hidden, 2 * config.z_dim)
    require_embeddings(config)
    return AttributeConv(n_condition, config.conditioner.width, config.prior.hidden, 2 * config.z_dim)


class Prior(nn.Module):
    """The base of all priors: e(y) [B, E] -> a distribution of z [B, D]."""

    fit_noise = 0  # normal numbers that the distribution's `fit_loss` needs for each code

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Take notice of the codes' mean and deviation [D] before the stage `refine` fits the prior."""

    def keep_weak(self, averaged: Prior) -> None:
        """Take notice of the averaged weights early in the stage `refine`."""

    def forward(self, e: Tensor) -> Distribution:
        """Map e [B, E] to a distribution of z [B, D]."""
        raise NotImplementedError

    def to_leave(self, e: Tensor) -> Distribution:
        """Map e [B, E] without attributes to the distribution that guidance leads away from."""
        return self(e)


class StandardPrior(Prior):
    """p(z|y) = N(0, I) for every y."""

    def __init__(self, config: ModelConfig, n_condition: int) -> None:
        super().__init__()
        self.z_dim = config.z_dim

    def forward(self, e: Tensor) -> DiagonalGaussian:
        """Map e [B, E] to a distribution of z [B, D]."""
        zeros = full_precision(e).new_zeros(e.shape[0], self.z_dim)
        return DiagonalGaussian(zeros, zeros)


class GaussianPrior(Prior):
    """p(z|y) = N(mu_p(y), sigma_p(y)^2)."""

    def __init__(self, config: ModelConfig, n_condition: int) -> None:
        super().__init__()
        self.net = prior_net(config, n_condition)
        self.log_sigma_min = config.log_sigma_min

    def forward(self, e: Tensor) -> DiagonalGaussian:
        """Map e [B, E] to a distribution of z [B, D]."""
        mean, log_std = self.net(full_precision(e)).chunk(2, dim=1)
        return DiagonalGaussian(mean, soft_floor(log_std, self.log_sigma_min))


class FlowPrior(Prior):
    """log p(z|y) = log N(f(z); mu_p(y), sigma_p(y)^2) + log|det df/dz|."""

    def __init__(self, config: ModelConfig, n_condition: int) -> None:
        super().__init__()
        self.base = GaussianPrior(config, n_condition)
        self.flow = Flow(config.z_dim, n_condition, config.prior.flow)

    def forward(self, e: Tensor) -> FlowDistribution:
        """Map e [B, E] to a distribution of z [B, D]."""
        # At least float32 throughout: in bfloat16 the log-determinant is off by 0.05 nats.
        return FlowDistribution(self.base(e), self.flow, full_precision(e))


class FlowMatchingPrior(Prior):
    """A continuous normalizing flow with a free-form velocity; the stage `refine` fits it.

    With `weak`, it holds a copy of itself from early in that training. Guidance then leads away from what
    little training knows, also where the attributes play no part (arXiv 2406.02507).
    """

    def __init__(self, config: ModelConfig, n_condition: int) -> None:
        super().__init__()
        settings = config.prior.flow_matching
        self.steps = settings.steps
        self.fit_noise = settings.draws * (config.z_dim + 1)  # a time and a noise for each draw
        self.condition = Condition(n_condition, settings.condition)
        self.velocity = VELOCITIES[settings.net](config.z_dim, settings.condition, settings)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(config.z_dim))
        self.register_buffer("scale", torch.ones(config.z_dim))
        self.weak: FlowMatchingPrior | None = None
        if settings.weak:
            self.weak = untrained(copy.deepcopy(self))

    def forward(self, e: Tensor) -> FlowMatchingDistribution:
        """Map e [B, E] to a distribution of z [B, D]."""
        return FlowMatchingDistribution(self, full_precision(e))

    def to_leave(self, e: Tensor) -> FlowMatchingDistribution:
        """Map e [B, E] without attributes to the weak copy's distribution, or without one to its own."""
        return FlowMatchingDistribution(self.weak or self, full_precision(e))

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Standardise the codes from now on: (z - mean) / std."""
        for prior in (self, self.weak):
            if prior is not None:
                prior.shift.copy_(mean)
                prior.scale.copy_(std)

    def keep_weak(self, averaged: Prior) -> None:
        """Make the weak copy equal to `averaged`, a prior of the same kind, as it is now."""
        if self.weak is not None:
            weights = averaged.state_dict()
            self.weak.load_state_dict({name: weights[name] for name in self.weak.state_dict()})


def untrained(module: FlowMatchingPrior) -> FlowMatchingPrior:
    """Turn the parameters of `module` into buffers: they are stored with the model, but never fitted."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.detach())
    return module


PRIORS: dict[str, type[Prior]] = {
    "standard": StandardPrior,
    "gaussian": GaussianPrior,
    "flow": FlowPrior,
    "flow_matching": FlowMatchingPrior,
}

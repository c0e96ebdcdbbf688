"""The conditional VAE, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae.anomaly import anomaly_score
from cvae.attributes import CONDITIONERS, UNKNOWN
from cvae.config import ModelConfig
from cvae.control import attribute_control
from cvae.distributions import DiagonalGaussian, Distribution
from cvae.losses import (
    Losses,
    Sums,
    Terms,
    loss_terms,
    loss_weights,
    means,
    objective,
    pack,
    squared_error,
    unpack,
)
from cvae.nets.decoder import DECODERS
from cvae.nets.encoder import ENCODERS
from cvae.nets.residual import ResidualDecoder
from cvae.priors.prior import PRIORS
from cvae.variance import DECODER_VARIANCES


def identity(x: Tensor) -> Tensor:
    """The reduction over ranks of a single rank."""
    return x


class CVAE(nn.Module):
    """A conditional VAE for images [B, 3, S, S] in [-1, 1] and attributes [B, A] in {0, 1}."""

    def __init__(self, config: ModelConfig, image_size: int, n_attributes: int) -> None:
        super().__init__()
        self.z_dim = config.z_dim
        self.image_size = image_size
        self.n_attributes = n_attributes
        self.conditioner = CONDITIONERS[config.conditioner.name](config.conditioner, n_attributes)
        n_condition = self.conditioner.width
        self.encoder = ENCODERS[config.encoder.name](config, image_size, n_condition)
        self.decoder = DECODERS[config.decoder.name](config, image_size, n_condition)
        self.control = attribute_control(config, n_attributes)
        self.anomaly = anomaly_score(config, image_size)
        self.conditional_prior = PRIORS[config.prior.name](config, n_condition)
        self.variance = DECODER_VARIANCES[config.variance.name](config.variance)
        self.loss_terms = loss_terms(config.losses)
        self.loss_weights = loss_weights(config.losses)

    @property
    def pixels(self) -> int:
        """P = 3 * S * S."""
        return 3 * self.image_size * self.image_size

    @property
    def noise_width(self) -> int:
        """Normal numbers that `forward` needs for each image."""
        return self.z_dim

    @property
    def term_names(self) -> tuple[str, ...]:
        """The names of the values of `terms`."""
        return ("sse", "kl", "log_det", *self.loss_weights)

    def condition(self, y: Tensor) -> Tensor:
        """Return e(y) [B, E]; never under autocast, since the prior needs full precision."""
        with torch.autocast(y.device.type, enabled=False):
            return self.conditioner(y)

    def encode(self, x: Tensor, y: Tensor) -> DiagonalGaussian:
        """Return q(z|x,y)."""
        return self.encoder(x, self.condition(y))

    def prior(self, y: Tensor) -> Distribution:
        """Return p(z|y), the one prior of training and sampling."""
        with torch.autocast(y.device.type, enabled=False):
            return self.conditional_prior(self.condition(y))

    def guided_prior(self, y: Tensor, strength: float) -> Distribution:
        """Return p(z|y) that follows y `strength` times as closely; 1 is `prior`.

        Raises ValueError if the prior cannot be guided.
        """
        if strength == 1.0:
            return self.prior(y)
        with torch.autocast(y.device.type, enabled=False):
            free = self.conditional_prior.to_leave(self.condition(torch.full_like(y, UNKNOWN)))
        return self.prior(y).guided(free, strength)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the mean of p(x|z,y): [B, 3, S, S] in [-1, 1]."""
        return self.decoder(z, self.condition(y))

    def middle(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the map [B, C, H, W] in the middle of a residual decoder."""
        assert isinstance(self.decoder, ResidualDecoder)
        return self.decoder.middle(z, self.condition(y))

    def anomaly_of(self, z: Tensor, y: Tensor) -> Tensor:
        """Return how anomalous codes are [B]; 0 is the mean of training images."""
        assert self.anomaly is not None
        return self.anomaly(self.middle(z, y))

    def terms(self, x: Tensor, y: Tensor, noise: Tensor) -> Terms:
        """Run the model once: q(z|x,y) and every named term of each image [B].

        `noise` [B, D] is standard normal; z = mean_q + std_q * noise. D further columns shift z.
        """
        e = self.condition(y)
        q = self.encoder(x, e)
        z = q.sample(noise[:, : self.z_dim])
        if noise.shape[1] > self.z_dim:
            z = z + noise[:, self.z_dim :]
        decoded = self.decoder(z, e)
        with torch.autocast(x.device.type, enabled=False):
            kl, log_det = self.conditional_prior(e).kl_from(q, z)
            values = {"sse": squared_error(x, decoded), "kl": kl, "log_det": log_det}
            for name, term in self.loss_terms.items():
                values[name] = term(x, decoded, y)
        return Terms(q, values)

    def sums(self, x: Tensor, y: Tensor, noise: Tensor) -> Sums:
        """Sum the terms over these images, which may be none."""
        if len(x) == 0:
            # A rank without images still takes part in the collectives of the backward pass.
            blank = [t.new_zeros(1, *t.shape[1:]) for t in (x, y, noise)]
            one = self.sums(*blank)
            return {name: 0 * value for name, value in one.items()}
        values = self.terms(x, y, noise).values
        sums = {name: value.sum() for name, value in values.items()}
        sums["images"] = sums["sse"].new_full((), float(len(x)))
        return sums

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor,
        beta: float | Tensor,
        scale: float,
        reduce_sum: Callable[[Tensor], Tensor] = identity,
    ) -> Losses:
        """Return the losses of the global batch (all ranks; a rank's share may be empty).

        `scale`: ranks / images of the global batch. `reduce_sum` turns this share's packed sums into
        those of the global batch; both are float64.
        """
        local = self.sums(x, y, noise)
        total = unpack(reduce_sum(pack(local)), local)
        s2 = self.variance(total["sse"] / (total["images"] * float(self.pixels)))
        values = means(total, s2.detach(), self.pixels, beta, self.loss_weights)
        share = objective(local, s2, self.pixels, beta, self.loss_weights, scale)
        return Losses(share, values)

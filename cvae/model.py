"""The conditional VAE put together from its configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae.attributes import CONDITIONERS
from cvae.config import ModelConfig
from cvae.decoder import Decoder
from cvae.distributions import DiagonalGaussian, Distribution, kl_divergence
from cvae.encoder import Encoder
from cvae.losses import Losses, Sums, combine, squared_error
from cvae.prior import PRIORS
from cvae.variance import DECODER_VARIANCES


def identity(x: Tensor) -> Tensor:
    """The reduction over ranks where there is one rank."""
    return x


class CVAE(nn.Module):
    """Conditional VAE for images [B, 3, S, S] in [-1, 1] and attributes [B, A] in {0, 1}."""

    def __init__(self, config: ModelConfig, image_size: int, n_attributes: int) -> None:
        super().__init__()
        self.z_dim, self.image_size, self.n_attributes = config.z_dim, image_size, n_attributes
        self.conditioner = CONDITIONERS[config.conditioner.name](config.conditioner, n_attributes)
        self.encoder = Encoder(config, image_size, self.conditioner.width)
        self.decoder = Decoder(config, image_size, self.conditioner.width)
        self.conditional_prior = PRIORS[config.prior.name](config, self.conditioner.width)
        self.variance = DECODER_VARIANCES[config.variance.name](config.variance)

    @property
    def pixels(self) -> int:
        """P = 3 * S * S."""
        return 3 * self.image_size * self.image_size

    def condition(self, y: Tensor) -> Tensor:
        """e(y) [B, E], never under autocast: the prior needs it whole."""
        with torch.autocast(y.device.type, enabled=False):
            return self.conditioner(y)

    def encode(self, x: Tensor, y: Tensor) -> DiagonalGaussian:
        """q(z|x,y)."""
        return self.encoder(x, self.condition(y))

    def prior(self, y: Tensor) -> Distribution:
        """p(z|y), the one prior of training and sampling."""
        with torch.autocast(y.device.type, enabled=False):
            return self.conditional_prior(self.condition(y))

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean of p(x|z,y): [B, 3, S, S] in [-1, 1]."""
        return self.decoder(z, self.condition(y))

    def sums(self, x: Tensor, y: Tensor, noise: Tensor) -> Sums:
        """Squared error, KL and log-determinant summed over these images; noise [B, D] is that of z ~ q."""
        if len(x) == 0:  # a rank without a share still takes part in the collectives of the backward pass
            blank = self.sums(
                x.new_zeros(1, *x.shape[1:]), y.new_zeros(1, *y.shape[1:]), noise.new_zeros(1, self.z_dim)
            )
            return Sums(*(0 * s for s in blank))
        e = self.condition(y)
        q = self.encoder(x, e)
        z = q.sample(noise)
        sse = squared_error(x, self.decoder(z, e)).sum()
        with torch.autocast(x.device.type, enabled=False):
            kl, log_det = kl_divergence(q, self.conditional_prior(e), z)
        return Sums(sse, kl.sum(), log_det.sum(), sse.new_tensor(float(len(x))))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor,
        beta: float,
        scale: float,
        reduce_sum: Callable[[Tensor], Tensor] = identity,
    ) -> Losses:
        """Losses of the global batch, of which these images are this rank's share (all ranks call it; the share may be empty).

        `scale`: ranks / images of the global batch. `reduce_sum`: float64 sums of this share [4] -> of the global batch [4].
        """
        local = self.sums(x, y, noise)
        total = Sums(*reduce_sum(torch.stack([s.detach().double() for s in local])))
        s2 = self.variance(total.sse / (total.images * self.pixels))
        return combine(local, total, s2, beta, scale, self.pixels)

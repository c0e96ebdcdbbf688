"""Encoders: networks of q(z|x,y).

A new encoder needs its class and its line in `ENCODERS`. It is built from
(config, image_size, n_condition) and maps x [B, 3, H, H] and e(y) [B, E] to a DiagonalGaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.distributions import DiagonalGaussian
from cvae.nets.layers import ACTIVATIONS, Linear, full_precision, norm, soft_floor
from cvae.nets.residual import ResidualEncoder
from cvae.nets.shapes import halvings


class ConvEncoder(nn.Module):
    """Stride-2 convolutions over the image and a fourth channel computed from the attributes."""

    def __init__(self, config: ModelConfig, image_size: int, n_condition: int) -> None:
        super().__init__()
        net = config.net
        self.image_size = image_size
        self.log_sigma_min = config.log_sigma_min
        self.attribute_channel = Linear(n_condition, image_size * image_size)

        layers: list[nn.Module] = []
        n_in = 4
        for n_out in net.channels:
            # The norm's own shift makes a bias in front of it useless.
            layers += [
                nn.Conv2d(n_in, n_out, 4, 2, 1, bias=net.norm == "none"),
                norm(net.norm, n_out),
                ACTIVATIONS[net.activation](),
            ]
            n_in = n_out
        self.convs = nn.Sequential(*layers)

        last_size = halvings(image_size, len(net.channels))[-1]
        self.out = Linear(n_in * last_size * last_size, 2 * config.z_dim)

    def forward(self, x: Tensor, e: Tensor) -> DiagonalGaussian:
        """Return q(z|x,y); its tensors [B, D] are at least float32, also under autocast."""
        plane = self.attribute_channel(e).view(-1, self.image_size, self.image_size, 1)
        channel = plane.permute(0, 3, 1, 2)  # laid out as images with channels last: so is what is joined
        features = self.convs(torch.cat((x, channel.to(x.dtype)), dim=1))
        mean, log_std = full_precision(self.out(features.flatten(1))).chunk(2, dim=1)
        return DiagonalGaussian(mean, soft_floor(log_std, self.log_sigma_min))


ENCODERS: dict[str, type[ConvEncoder] | type[ResidualEncoder]] = {
    "conv": ConvEncoder,
    "residual": ResidualEncoder,
}

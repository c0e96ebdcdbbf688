"""Encoder q(z|x,y): stride-2 convolutions over the image and one more channel made of the attributes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.distributions import DiagonalGaussian
from cvae.layers import ACTIVATIONS, full_precision, halvings, norm, soft_floor


class Encoder(nn.Module):
    """x [B, 3, H, H], e(y) [B, E] -> q(z|x,y)."""

    def __init__(self, config: ModelConfig, image_size: int, n_condition: int) -> None:
        super().__init__()
        net = config.net
        self.image_size, self.log_sigma_min = image_size, config.log_sigma_min
        self.attribute_channel = nn.Linear(n_condition, image_size * image_size)
        layers: list[nn.Module] = []
        for n_in, n_out in zip([4, *net.channels], net.channels, strict=False):
            # The norm's own shift makes a bias before it useless.
            layers += [
                nn.Conv2d(n_in, n_out, 4, 2, 1, bias=net.norm == "none"),
                norm(net.norm, n_out),
                ACTIVATIONS[net.activation](),
            ]
        self.convs = nn.Sequential(*layers)
        last = halvings(image_size, len(net.channels))[-1]
        self.out = nn.Linear(net.channels[-1] * last * last, 2 * config.z_dim)

    def forward(self, x: Tensor, e: Tensor) -> DiagonalGaussian:
        """Mean and ln std of q in at least float32, also under autocast."""
        plane = self.attribute_channel(e).view(-1, 1, self.image_size, self.image_size)
        features = self.convs(torch.cat((x, plane.to(x.dtype)), dim=1))
        mean, log_std = full_precision(self.out(features.flatten(1))).chunk(2, dim=1)
        return DiagonalGaussian(mean, soft_floor(log_std, self.log_sigma_min))

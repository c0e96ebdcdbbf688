"""Decoders: networks of the mean image of p(x|z,y).

A new decoder needs its class and its line in `DECODERS`. It is built from
(config, image_size, n_condition) and maps z [B, D] and e(y) [B, E] to images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.nets.layers import ACTIVATIONS, Linear, full_precision, norm
from cvae.nets.residual import ResidualDecoder
from cvae.nets.shapes import halvings


class ConvDecoder(nn.Module):
    """Transposed stride-2 convolutions that mirror the encoder `conv`; any image size."""

    def __init__(self, config: ModelConfig, image_size: int, n_condition: int) -> None:
        super().__init__()
        net = config.net
        sizes = halvings(image_size, len(net.channels))[::-1]
        channels = [*reversed(net.channels), 3]
        last = len(channels) - 2
        self.first = (channels[0], sizes[0], sizes[0])
        self.linear = Linear(config.z_dim + n_condition, channels[0] * sizes[0] ** 2)

        layers: list[nn.Module] = []
        for i in range(last + 1):
            # 86 pixels shrink to 43, then to 21: on the way back 21 needs one more pixel.
            odd = sizes[i + 1] - 2 * sizes[i]
            # The norm's own shift makes a bias in front of it useless.
            bias = i == last or net.norm == "none"
            layers.append(
                nn.ConvTranspose2d(channels[i], channels[i + 1], 4, 2, 1, output_padding=odd, bias=bias)
            )
            if i < last:
                layers += [norm(net.norm, channels[i + 1]), ACTIVATIONS[net.activation]()]
        layers.append(nn.Tanh())
        self.convs = nn.Sequential(*layers)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        """Map z [B, D], e(y) [B, E] to a mean image [B, 3, H, H] in [-1, 1], at least float32."""
        inputs = torch.cat((z, e.to(z.dtype)), dim=1)
        features = self.linear(inputs).unflatten(1, self.first)
        return full_precision(self.convs(features))


DECODERS: dict[str, type[ConvDecoder] | type[ResidualDecoder]] = {
    "conv": ConvDecoder,
    "residual": ResidualDecoder,
}

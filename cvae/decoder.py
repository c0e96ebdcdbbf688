"""Decoder: the mean image of p(x|z,y)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.layers import ACTIVATIONS, full_precision, halvings, norm


class Decoder(nn.Module):
    """z [B, D], e(y) [B, E] -> mean image [B, 3, H, H] in [-1, 1]; mirrors the encoder, any image size."""

    def __init__(self, config: ModelConfig, image_size: int, n_condition: int) -> None:
        super().__init__()
        net, sizes = config.net, halvings(image_size, len(config.net.channels))[::-1]
        channels = [*reversed(net.channels), 3]
        self.first = (channels[0], sizes[0], sizes[0])
        self.linear = nn.Linear(config.z_dim + n_condition, channels[0] * sizes[0] ** 2)
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(zip(channels, channels[1:], strict=False)):
            odd = sizes[i + 1] - 2 * sizes[i]  # 86 -> 43 -> 21: the way back needs one more pixel
            is_last = i == len(channels) - 2
            layers.append(
                nn.ConvTranspose2d(
                    n_in, n_out, 4, 2, 1, output_padding=odd, bias=is_last or net.norm == "none"
                )
            )
            layers += [nn.Tanh()] if is_last else [norm(net.norm, n_out), ACTIVATIONS[net.activation]()]
        self.convs = nn.Sequential(*layers)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        """Mean image in at least float32, also under autocast."""
        features = self.linear(torch.cat((z, e.to(z.dtype)), dim=1)).unflatten(1, self.first)
        return full_precision(self.convs(features))

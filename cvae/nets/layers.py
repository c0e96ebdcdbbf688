"""Small parts that several networks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.nets import onednn

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}


def norm(name: str, channels: int) -> nn.Module:
    """Return GroupNorm with at most 8 groups, or the identity for `none`.

    No norm here mixes the images of a batch: a step must not depend on how ranks share the batch.
    """
    if name == "none":
        return nn.Identity()
    groups = next(n for n in (8, 4, 2, 1) if channels % n == 0)
    return GroupNorm(groups, channels)


class GroupNorm(nn.GroupNorm):
    """GroupNorm, in at least float32 on a CPU, where the kernels for half types are seven times slower."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, H, W]."""
        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16
        return super().forward(x.float() if slow else x)


class Linear(nn.Linear):
    """A linear layer with the fastest product of the device."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, I] to [B, O]."""
        return onednn.linear(x, self.weight, self.bias) if onednn.serves(x) else super().forward(x)


class Mlp(nn.Sequential):
    """Linear layers and activations in turn, with the fastest products of the device."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, I] to [B, O]."""
        if not onednn.serves(x):
            return super().forward(x)
        layers = list(self)
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Linear):
                after = layers[i + 1] if i + 1 < len(layers) else None
                slope = after.negative_slope if isinstance(after, nn.LeakyReLU) else 1.0
                x = onednn.linear(x, layer.weight, layer.bias, slope)
            elif not isinstance(layer, nn.LeakyReLU):  # the linear layer before it has done that one
                x = layer(x)
        return x


def mlp(n_in: int, hidden: int, n_out: int, depth: int = 1, activation: type[nn.Module] = nn.SiLU) -> Mlp:
    """Return `depth` hidden layers of `hidden` units and an output layer that starts at zero."""
    layers: list[nn.Module] = []
    width = n_in
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), activation()]
        width = hidden
    return Mlp(*layers, zeroed(nn.Linear(width, n_out)))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Set weights and bias to 0, so a flow starts as the identity and a prior as N(0, I)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def soft_floor(x: Tensor, floor: float) -> Tensor:
    """Bound x from below smoothly: about x far above `floor`, with a gradient everywhere."""
    return floor + F.softplus(x - floor)


def full_precision(x: Tensor) -> Tensor:
    """Raise half types to float32; keep float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""A conditional prior learned by flow matching: a continuous normalizing flow with a free-form velocity.

A straight path joins noise and code: z_t = (1 - t) noise + t z, with t from 0 to 1. A network learns the mean velocity
v(z_t, t, e) = E[z - noise | z_t, e(y)] by least squares (arXiv 2210.02747). The solution of dz/dt = v carries noise to
codes, so sampling, its inverse and the density all come from one ordinary differential equation.

Shapes: B codes, D latent dimensions, E size of e(y), W width of the network.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import FlowMatchingConfig
from cvae.layers import full_precision, norm, zeroed

FREQUENCIES = 32


class Condition(nn.Module):
    """Time and e(y) -> one vector that modulates every block."""

    def __init__(self, n_condition: int, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0, math.log(200.0), FREQUENCIES).exp())
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Linear(n_condition, width)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor, e: Tensor) -> Tensor:
        """t [B] in [0, 1], e [B, E] -> [B, W]."""
        angles = t[:, None] * self.frequencies
        waves = torch.cat((angles.sin(), angles.cos()), dim=1)
        return self.mix(self.time(waves) + self.label(e))


class VectorBlock(nn.Module):
    """A residual MLP whose LayerNorm is scaled and shifted by the condition. It starts as the identity."""

    def __init__(self, width: int, n_condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(n_condition, 3 * width))
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h [B, W], c [B, C] -> [B, W]."""
        scale, shift, gate = self.modulation(c).chunk(3, dim=1)
        return h + gate * self.net(self.norm(h) * (1 + scale) + shift)


class VectorVelocity(nn.Module):
    """Velocity of a code that is one vector: a residual MLP."""

    def __init__(self, z_dim: int, n_condition: int, config: FlowMatchingConfig) -> None:
        super().__init__()
        self.first = nn.Linear(z_dim, config.width)
        self.blocks = nn.ModuleList(VectorBlock(config.width, n_condition) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(n_condition, 2 * config.width))
        self.last = zeroed(nn.Linear(config.width, z_dim))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z [B, D], c [B, C] -> velocity [B, D]."""
        h = self.first(z)
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.modulation(c).chunk(2, dim=1)
        return self.last(self.norm(h) * (1 + scale) + shift)


class GridBlock(nn.Module):
    """Residual 3x3 convolutions with a modulated GroupNorm. It starts as the identity."""

    def __init__(self, channels: int, n_condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm("group", channels), norm("group", channels)
        self.modulation = zeroed(nn.Linear(n_condition, 2 * channels))
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, W, H, H], c [B, C] -> [B, W, H, H]."""
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))


class GridVelocity(nn.Module):
    """Velocity of a code that is a grid: a small U-net, with an MLP over the whole face at its bottom."""

    def __init__(self, z_dim: int, n_condition: int, config: FlowMatchingConfig) -> None:
        super().__init__()
        self.side = config.side
        channels, rest = divmod(z_dim, config.side**2)
        if rest or config.side % 2:
            raise ValueError(
                f"prior.flow_matching.side: z of {z_dim} dimensions is no grid of {config.side}x{config.side}"
                " cells with an even side; set it to the side of the encoder's grid"
            )
        narrow, wide = config.channels, 2 * config.channels
        # Faces are aligned, so a learned position tells a cell where in the face it lies.
        self.position = nn.Parameter(0.02 * torch.randn(1, narrow, config.side, config.side))
        self.first = nn.Conv2d(channels, narrow, 3, padding=1)
        self.enter = GridBlock(narrow, n_condition)
        self.down = nn.Conv2d(narrow, wide, 4, 2, 1)
        self.low = nn.ModuleList(GridBlock(wide, n_condition) for _ in range(2))
        self.whole = VectorVelocity(wide * (config.side // 2) ** 2, n_condition, config)
        self.up = nn.Conv2d(wide, narrow, 3, padding=1)
        self.leave = nn.ModuleList(GridBlock(narrow, n_condition) for _ in range(2))
        self.norm = norm("group", narrow)
        self.last = nn.Conv2d(narrow, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z [B, D], c [B, C] -> velocity [B, D]."""
        x = self.first(z.unflatten(1, (-1, self.side, self.side))) + self.position
        x = self.enter(x, c)
        h = self.low[0](self.down(x), c)
        h = h + self.whole(h.flatten(1), c).view(h.shape)
        h = self.low[1](h, c)
        x = x + self.up(F.interpolate(h, scale_factor=2, mode="nearest"))
        for block in self.leave:
            x = block(x, c)
        return self.last(F.silu(self.norm(x))).flatten(1)


VELOCITIES: dict[str, type[VectorVelocity] | type[GridVelocity]] = {
    "vector": VectorVelocity,
    "grid": GridVelocity,
}

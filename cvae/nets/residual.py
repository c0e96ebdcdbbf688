"""Residual encoder and decoder. The attributes modulate every block, so no layer can forget them.

Each block is x + conv(silu(norm(conv(silu(norm(x)))))), where e(y) scales and shifts both norms. The
decoder enlarges by nearest-neighbour copies and a convolution, which leaves no checkerboards. The
code z is a vector, or a grid of cells that keep their place in the image (`grid` in the
configuration). Both travel as flat vectors [B, D], so priors, metrics and checkpoints need not know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import ModelConfig, ResidualConfig
from cvae.distributions import DiagonalGaussian
from cvae.nets.layers import full_precision, norm, soft_floor, zeroed


class ModulatedNorm(nn.Module):
    """GroupNorm whose scale and shift depend on e(y). It starts as a plain GroupNorm."""

    def __init__(self, channels: int, n_condition: int) -> None:
        super().__init__()
        self.norm = norm("group", channels)
        self.modulation = zeroed(nn.Linear(n_condition, 2 * channels))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, C, H, W], e [B, E] -> [B, C, H, W]."""
        scale, shift = self.modulation(e).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with modulated norms; the sum starts close to the identity."""

    FIRST_SCALE = 0.1  # of the last convolution's weights

    def __init__(self, channels: int, n_condition: int) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(channels, n_condition)
        self.norm2 = ModulatedNorm(channels, n_condition)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight *= self.FIRST_SCALE

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, C, H, W], e [B, E] -> [B, C, H, W]."""
        h = self.conv1(F.silu(self.norm1(x, e)))
        return x + self.conv2(F.silu(self.norm2(h, e)))


class Level(nn.Module):
    """The residual blocks of one image size."""

    def __init__(self, channels: int, blocks: int, n_condition: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels, n_condition) for _ in range(blocks))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, C, H, W], e [B, E] -> [B, C, H, W]."""
        for block in self.blocks:
            x = block(x, e)
        return x


def smallest_side(net: ResidualConfig, image_size: int) -> int:
    """Return the side of the smallest feature map, pixels.

    Raises ValueError if the image cannot be halved that often.
    """
    side, rest = divmod(image_size, 2 ** len(net.channels))
    if rest or side < 1:
        raise ValueError(
            f"model.residual.channels: {len(net.channels)} halvings need an image size that is a multiple of"
            f" {2 ** len(net.channels)}, got {image_size}; use fewer entries or another shard.size"
        )
    return side


def cell_channels(net: ResidualConfig, z_dim: int, side: int) -> int:
    """Channels of one cell of a grid code. Raises ValueError if `z_dim` does not fill the grid evenly."""
    if z_dim % side**2:
        raise ValueError(
            f"model.z_dim: {z_dim} does not fill {side}x{side} cells evenly;"
            f" model.residual.grid needs a multiple of {side**2}"
        )
    return z_dim // side**2


class ResidualEncoder(nn.Module):
    """x [B, 3, S, S], e(y) [B, E] -> q(z|x,y)."""

    def __init__(self, config: ModelConfig, image_size: int, n_condition: int) -> None:
        super().__init__()
        net = config.residual
        side = smallest_side(net, image_size)
        widths = [3, *net.channels]
        self.log_sigma_min = config.log_sigma_min
        self.downs = nn.ModuleList(
            nn.Conv2d(before, after, 4, 2, 1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.levels = nn.ModuleList(
            Level(width, blocks, n_condition)
            for width, blocks in zip(net.channels, net.encoder_blocks, strict=True)
        )
        last = net.channels[-1]
        self.norm = ModulatedNorm(last, n_condition)
        self.out: nn.Module
        if net.grid:
            self.out = nn.Conv2d(last, 2 * cell_channels(net, config.z_dim, side), 1)
        else:
            self.out = nn.Sequential(nn.Flatten(), nn.Linear(last * side**2, 2 * config.z_dim))

    def forward(self, x: Tensor, e: Tensor) -> DiagonalGaussian:
        """Mean and ln std of q [B, D], in at least float32 also under autocast."""
        for i, (down, level) in enumerate(zip(self.downs, self.levels, strict=True)):
            x = level(down(F.silu(x) if i else x), e)
        out = full_precision(self.out(F.silu(self.norm(x, e))))
        mean, log_std = out.chunk(2, dim=1)
        return DiagonalGaussian(mean.flatten(1), soft_floor(log_std.flatten(1), self.log_sigma_min))


class ResidualDecoder(nn.Module):
    """z [B, D], e(y) [B, E] -> mean image [B, 3, S, S] in [-1, 1]."""

    def __init__(self, config: ModelConfig, image_size: int, n_condition: int) -> None:
        super().__init__()
        net = config.residual
        self.side = smallest_side(net, image_size)
        widths = net.channels[::-1]
        self.grid = net.grid
        self.first: nn.Module
        if net.grid:
            self.first = nn.Conv2d(cell_channels(net, config.z_dim, self.side), widths[0], 3, padding=1)
        else:
            self.first = nn.Linear(config.z_dim, widths[0] * self.side**2)
        self.levels = nn.ModuleList(
            Level(width, blocks, n_condition)
            for width, blocks in zip(widths, net.decoder_blocks[::-1], strict=True)
        )
        self.ups = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.norm = ModulatedNorm(widths[-1], n_condition)
        # Four times three channels at half size, then depth to space: a quarter of the cost at full size.
        self.last = nn.Conv2d(widths[-1], 12, 3, padding=1)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        """Mean image in at least float32, also under autocast."""
        x = self.first(z.unflatten(1, (-1, self.side, self.side)) if self.grid else z)
        if not self.grid:
            x = x.unflatten(1, (-1, self.side, self.side))
        for i, level in enumerate(self.levels):
            x = level(x, e)
            if i < len(self.ups):
                x = self.ups[i](F.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.last(F.silu(self.norm(x, e)))
        return full_precision(F.pixel_shuffle(x, 2)).tanh()

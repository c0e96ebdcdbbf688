"""Residual encoder and decoder. The attributes modulate every block, so no layer can forget them.

Each block is x + conv(silu(norm(conv(silu(norm(x)))))), where e(y) scales and shifts both norms. The
decoder enlarges by nearest-neighbour copies and a convolution, which leaves no checkerboards. The
code z is a vector, or a grid of cells that keep their place in the image (`grid` in the
configuration). Both travel as flat vectors [B, D], so priors, metrics and checkpoints need not know.
Levels may also attend to the attributes or to themselves (`cross_attention`, `self_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.distributions import DiagonalGaussian
from cvae.nets.attention import PositionAttention
from cvae.nets.layers import full_precision, norm, soft_floor, zeroed
from cvae.nets.shapes import cell_channels, level_sides


class ModulatedNorm(nn.Module):
    """GroupNorm whose scale and shift depend on e(y). It starts as a plain one, and stays so for E = 0."""

    def __init__(self, channels: int, n_condition: int) -> None:
        super().__init__()
        self.norm = norm("group", channels)
        self.modulation = zeroed(nn.Linear(n_condition, 2 * channels)) if n_condition else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, C, H, W], e [B, E] -> [B, C, H, W]."""
        if self.modulation is None:
            return self.norm(x)
        normed = self.norm(x)  # on a CPU float32 even where x is bfloat16
        scale, shift = self.modulation(e).to(normed.dtype)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, normed, 1 + scale)


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
    """The residual blocks of one image size, then its attention."""

    def __init__(self, config: ModelConfig, side: int, channels: int, blocks: int, n_condition: int) -> None:
        super().__init__()
        net = config.residual
        n_modulating = n_condition if net.modulated else 0
        parts: list[nn.Module] = [ResidualBlock(channels, n_modulating) for _ in range(blocks)]
        if side in net.self_attention:
            parts.append(PositionAttention(channels, side))
        if side in net.cross_attention:
            parts.append(PositionAttention(channels, side, config.conditioner.width))
        self.blocks = nn.ModuleList(parts)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, C, H, W], e [B, E] -> [B, C, H, W]."""
        for block in self.blocks:
            x = block(x, e)
        return x


class ResidualEncoder(nn.Module):
    """x [B, 3, S, S], e(y) [B, E] -> q(z|x,y)."""

    def __init__(self, config: ModelConfig, image_size: int, n_condition: int) -> None:
        super().__init__()
        net = config.residual
        sides = level_sides(config, image_size)
        widths = [3, *net.channels]
        self.log_sigma_min = config.log_sigma_min
        self.downs = nn.ModuleList(
            nn.Conv2d(before, after, 4, 2, 1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.levels = nn.ModuleList(
            Level(config, side, width, blocks, n_condition)
            for side, width, blocks in zip(sides, net.channels, net.encoder_blocks, strict=True)
        )
        last, side = net.channels[-1], sides[-1]
        self.norm = ModulatedNorm(last, n_condition if net.modulated else 0)
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
        sides = level_sides(config, image_size)[::-1]
        self.side = sides[0]
        widths = net.channels[::-1]
        self.grid = net.grid
        self.antialias = net.antialias
        self.first: nn.Module
        if net.grid:
            self.first = nn.Conv2d(cell_channels(net, config.z_dim, self.side), widths[0], 3, padding=1)
        else:
            self.first = nn.Linear(config.z_dim, widths[0] * self.side**2)
        self.levels = nn.ModuleList(
            Level(config, side, width, blocks, n_condition)
            for side, width, blocks in zip(sides, widths, net.decoder_blocks[::-1], strict=True)
        )
        self.ups = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.norm = ModulatedNorm(widths[-1], n_condition if net.modulated else 0)
        # Four times three channels at half size, then depth to space: a quarter of the cost at full size.
        self.last = nn.Conv2d(widths[-1], 12, 3, padding=1)

    def maps(self, z: Tensor, e: Tensor) -> Iterator[Tensor]:
        """Yield the feature map of each level, small to large, [B, C, H, W]."""
        x = self.first(z.unflatten(1, (-1, self.side, self.side)) if self.grid else z)
        if not self.grid:
            x = x.unflatten(1, (-1, self.side, self.side))
        for i, level in enumerate(self.levels):
            if i:
                x = self.ups[i - 1](F.interpolate(x, scale_factor=2, mode="nearest"))
            x = level(x, e)
            yield x

    def middle(self, z: Tensor, e: Tensor) -> Tensor:
        """Return the map of the level in the middle: see `shapes.middle_map`."""
        return next(islice(self.maps(z, e), len(self.levels) // 2, None))

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        """Mean image in at least float32, also under autocast."""
        *_, x = self.maps(z, e)
        x = self.last(F.silu(self.norm(x, e)))
        x = full_precision(F.pixel_shuffle(x, 2))
        if self.antialias:
            x = without_checkerboard(x)
        return x.tanh()


def without_checkerboard(x: Tensor) -> Tensor:
    """Remove the pattern +-+- of single pixels along both sides from images [B, C, S, S].

    The filter 1 - sin^2(u / 2) sin^2(v / 2) leaves patterns of rows alone or of columns alone as they are.
    """
    return x - _second_difference(_second_difference(x, 2), 3) / 16


def _second_difference(x: Tensor, dim: int) -> Tensor:
    """Return x[i - 1] - 2 x[i] + x[i + 1] along `dim`, mirrored at the ends."""
    # torch's own mirrored padding adds up gradients in any order on a GPU.
    n = x.shape[dim]
    mirrored = torch.cat((x.narrow(dim, 1, 1), x, x.narrow(dim, n - 2, 1)), dim)
    return mirrored.narrow(dim, 0, n) - 2 * x + mirrored.narrow(dim, 2, n)

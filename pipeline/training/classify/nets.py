"""The networks of the guides: four kinds, each from images [B, 3, S, S] in [-1, 1] to logits [B, A]."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

CELLS = 4  # side of the grid that the last layer sees
GROUPS = 8  # of GroupNorm: no image depends on its neighbours in a batch


class Residual(nn.Module):
    """Residual blocks with normalisation before each activation."""

    def __init__(self, n_attributes: int, width: int = 32) -> None:
        super().__init__()
        channels = [width, 2 * width, 3 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 5, 2, 2)
        levels = zip(channels, channels[1:], strict=False)
        self.levels = nn.ModuleList(_ResidualLevel(n_in, n_out) for n_in, n_out in levels)
        self.norm = nn.GroupNorm(GROUPS, channels[-1])
        self.head = nn.Linear(channels[-1] * CELLS**2, n_attributes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, A]."""
        x = self.stem(x)
        for level in self.levels:
            x = level(x)
        return self.head(_cells(F.silu(self.norm(x))))


class _ResidualLevel(nn.Module):
    """A block of one size, then one that halves it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, n_in)
        self.conv = nn.Conv2d(n_in, n_in, 3, 1, 1)
        self.down_norm = nn.GroupNorm(GROUPS, n_in)
        self.down = nn.Conv2d(n_in, n_out, 3, 2, 1)
        self.skip = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(F.silu(self.norm(x)))
        return self.skip(F.avg_pool2d(x, 2)) + self.down(F.silu(self.down_norm(x)))


class Patches(nn.Module):
    """Patches of 4 pixels, mixed by depthwise convolutions and pointwise layers in turn."""

    def __init__(self, n_attributes: int, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.fine = nn.Sequential(_Mix(width), _Mix(width))
        self.down = nn.Conv2d(width, width, 2, 2)
        self.coarse = nn.Sequential(_Mix(width), _Mix(width))
        self.head = nn.Linear(width * CELLS**2, n_attributes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, A]."""
        x = self.down(self.fine(self.embed(x)))
        return self.head(_cells(self.coarse(x)))


class _Mix(nn.Module):
    """A depthwise convolution, then two pointwise layers, around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, 1, 2, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Strided(nn.Sequential):
    """Strided convolutions and grouped ones in turn, each with GroupNorm and ReLU."""

    def __init__(self, n_attributes: int, width: int = 32) -> None:
        layers: list[nn.Module] = []
        n_in = 3
        for n_out in (width, 2 * width, 4 * width, 6 * width):
            layers += [nn.Conv2d(n_in, n_out, 4, 2, 1), nn.GroupNorm(GROUPS, n_out), nn.ReLU()]
            layers += [nn.Conv2d(n_out, n_out, 3, 1, 1, groups=4), nn.GroupNorm(GROUPS, n_out), nn.ReLU()]
            n_in = n_out
        head = (nn.AdaptiveAvgPool2d(CELLS), nn.Flatten(), nn.Linear(n_in * CELLS**2, n_attributes))
        super().__init__(*layers, *head)


class Coarse(nn.Module):
    """Residual convolutions on images of half the size, which see no fine texture."""

    def __init__(self, n_attributes: int, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        channels = [width, 2 * width, 3 * width, 4 * width]
        levels = list(zip(channels, channels[1:], strict=False))
        self.downs = nn.ModuleList(nn.Conv2d(n_in, n_out, 3, 2, 1) for n_in, n_out in levels)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, n_out) for _, n_out in levels)
        self.convs = nn.ModuleList(nn.Conv2d(n_out, n_out, 3, 1, 1) for _, n_out in levels)
        self.head = nn.Linear(channels[-1] * CELLS**2, n_attributes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, A]."""
        x = self.stem(F.avg_pool2d(x, 2))
        for down, norm, conv in zip(self.downs, self.norms, self.convs, strict=True):
            x = down(F.silu(x))
            x = x + conv(F.silu(norm(x)))
        return self.head(_cells(F.silu(x)))


def _cells(x: Tensor) -> Tensor:
    """Average to a grid of CELLS x CELLS and flatten it."""
    return F.adaptive_avg_pool2d(x, CELLS).flatten(1)


NETS: dict[str, Callable[[int], nn.Module]] = {
    "residual": Residual,
    "patches": Patches,
    "strided": Strided,
    "coarse": Coarse,
}

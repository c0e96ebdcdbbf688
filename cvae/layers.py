"""Small parts that several nets share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}
NORMS = ("group", "none")


def norm(name: str, channels: int) -> nn.Module:
    """GroupNorm over at most 8 groups, or nothing; never a norm that mixes the images of a batch."""
    return (
        nn.Identity()
        if name == "none"
        else nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0), channels)
    )


def mlp(
    n_in: int, hidden: int, n_out: int, depth: int = 1, activation: type[nn.Module] = nn.SiLU
) -> nn.Sequential:
    """`depth` hidden layers of `hidden` units; the output starts at zero."""
    widths = [n_in, *[hidden] * depth]
    layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers, zeroed(nn.Linear(widths[-1], n_out)))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with weights and bias 0: what it parametrises starts at the identity, or at N(0, I)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def soft_floor(x: Tensor, floor: float) -> Tensor:
    """Smooth lower bound: about x far above `floor`, never below it, with a gradient everywhere."""
    return floor + F.softplus(x - floor)


def full_precision(x: Tensor) -> Tensor:
    """At least float32: half types are raised, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def halvings(size: int, times: int) -> list[int]:
    """Side lengths after 0, 1, ... stride-2 convolutions (kernel 4, padding 1): [64, 32, 16, ...].

    Raises ValueError where fewer than 2 pixels would be left.
    """
    sizes = [size]
    for _ in range(times):
        sizes.append(sizes[-1] // 2)
    if sizes[-1] < 2:
        raise ValueError(
            f"model.net.channels: {times} halvings of a {size} pixel image leave {sizes[-1]}; use fewer entries"
        )
    return sizes

"""A conditional normalizing flow of affine coupling layers (RealNVP, arXiv 1605.08803)."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from cvae.config import FlowConfig
from cvae.nets.layers import mlp


class AffineCoupling(nn.Module):
    """Keep one half of z, and scale and shift the other half.

    u_kept = z_kept; u_moved = z_moved * exp(s) + t. A network computes s and t from z_kept and, if
    `conditional`, from e(y). |s| < bound (tanh), so the log-determinant stays below bound * D/2.
    The network's last layer starts at zero, so the layer starts as the identity.
    """

    def __init__(self, dim: int, keep_first: bool, n_condition: int, config: FlowConfig) -> None:
        super().__init__()
        self.top: Tensor
        self.span: Tensor
        self.steepness: Tensor
        self.keep_first = keep_first
        bound = config.bound
        for name, value in {"top": bound, "span": -2 * bound, "steepness": -2 / bound}.items():
            self.register_buffer(name, torch.tensor(value), persistent=False)
        self.conditional = config.conditional
        n_kept = dim // 2 if keep_first else dim - dim // 2
        n_in = n_kept + n_condition if config.conditional else n_kept
        self.net = mlp(n_in, config.hidden, 2 * (dim - n_kept), config.depth, nn.LeakyReLU)

    def scale_shift(self, kept: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return s = bound * tanh(raw / bound) and t of the moved half, for kept [B, K], e [B, E]."""
        inputs = torch.cat((kept, e), dim=1) if self.conditional else kept
        both = self.net(inputs)
        raw, shift = both.split(both.shape[1] // 2, dim=1)
        # tanh(x) = 1 - 2 sigmoid(-2 x), and a CPU is seven times faster at a sigmoid. Numbers of Python's
        # would be converted to tensors at every use, forward and backward.
        return self.top + self.span * torch.sigmoid(self.steepness * raw), shift

    def forward(self, kept: Tensor, moved: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Map the halves kept [B, K], moved [B, M] to u_moved [B, M] and log|det du/dz| [B]."""
        log_scale, shift = self.scale_shift(kept, e)
        return shift + moved * log_scale.exp(), log_scale.sum(1)

    def inverse(self, kept: Tensor, moved: Tensor, e: Tensor) -> Tensor:
        """Map the halves kept [B, K], u_moved [B, M] back to z_moved [B, M]."""
        log_scale, shift = self.scale_shift(kept, e)
        return (moved - shift) * (-log_scale).exp()


class Flow(nn.Module):
    """f: z -> u, a stack of coupling layers.

    The layers keep the two halves in turn, so the stack transforms every dimension.
    `alternate=False` always keeps the first half, as the paper's code does.
    """

    def __init__(self, dim: int, n_condition: int, config: FlowConfig) -> None:
        super().__init__()
        self.sizes = (dim // 2, dim - dim // 2)
        self.layers = nn.ModuleList()
        for i in range(config.layers):
            keep_first = i % 2 == 0 or not config.alternate
            self.layers.append(AffineCoupling(dim, keep_first, n_condition, config))

    def forward(self, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Map z [B, D], e [B, E] to u = f(z) [B, D] and log|det df/dz| [B]."""
        first, second = z.split(self.sizes, dim=1)  # the halves are joined again only at the end
        log_dets = []
        for layer in self.layers:
            if layer.keep_first:
                second, log_det = layer(first, second, e)
            else:
                first, log_det = layer(second, first, e)
            log_dets.append(log_det)
        return torch.cat((first, second), dim=1), reduce(torch.add, log_dets)

    def inverse(self, u: Tensor, e: Tensor) -> Tensor:
        """Map u [B, D], e [B, E] to z = f^-1(u) [B, D]."""
        first, second = u.split(self.sizes, dim=1)
        for layer in reversed(self.layers):
            assert isinstance(layer, AffineCoupling)
            if layer.keep_first:
                second = layer.inverse(first, second, e)
            else:
                first = layer.inverse(second, first, e)
        return torch.cat((first, second), dim=1)

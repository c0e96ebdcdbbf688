"""A conditional normalizing flow of affine coupling layers (RealNVP, arXiv 1605.08803)."""

from __future__ import annotations

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
        self.cut = dim // 2
        self.keep_first = keep_first
        self.bound = config.bound
        self.conditional = config.conditional
        n_kept = self.cut if keep_first else dim - self.cut
        n_in = n_kept + n_condition if config.conditional else n_kept
        self.net = mlp(n_in, config.hidden, 2 * (dim - n_kept), config.depth, nn.LeakyReLU)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z[:, : self.cut], z[:, self.cut :]
        return (first, second) if self.keep_first else (second, first)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((kept, moved) if self.keep_first else (moved, kept), dim=1)

    def _scale_shift(self, kept: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat((kept, e), dim=1) if self.conditional else kept
        raw, shift = self.net(inputs).chunk(2, dim=1)
        return self.bound * torch.tanh(raw / self.bound), shift

    def forward(self, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Map z [B, D], e [B, E] to u [B, D] and log|det du/dz| [B]."""
        kept, moved = self._split(z)
        log_scale, shift = self._scale_shift(kept, e)
        return self._join(kept, moved * log_scale.exp() + shift), log_scale.sum(1)

    def inverse(self, u: Tensor, e: Tensor) -> Tensor:
        """Map u [B, D], e [B, E] back to z [B, D]."""
        kept, moved = self._split(u)
        log_scale, shift = self._scale_shift(kept, e)
        return self._join(kept, (moved - shift) * (-log_scale).exp())


class Flow(nn.Module):
    """f: z -> u, a stack of coupling layers.

    The layers keep the two halves in turn, so the stack transforms every dimension.
    `alternate=False` always keeps the first half, as the paper's code does.
    """

    def __init__(self, dim: int, n_condition: int, config: FlowConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(config.layers):
            keep_first = i % 2 == 0 or not config.alternate
            self.layers.append(AffineCoupling(dim, keep_first, n_condition, config))

    def forward(self, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Map z [B, D], e [B, E] to u = f(z) [B, D] and log|det df/dz| [B]."""
        log_det = z.new_zeros(len(z))
        for layer in self.layers:
            z, more = layer(z, e)
            log_det = log_det + more
        return z, log_det

    def inverse(self, u: Tensor, e: Tensor) -> Tensor:
        """Map u [B, D], e [B, E] to z = f^-1(u) [B, D]."""
        for layer in reversed(self.layers):
            u = layer.inverse(u, e)  # type: ignore[operator]
        return u

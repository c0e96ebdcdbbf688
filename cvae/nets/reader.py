"""A network that reads attributes from codes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cvae.nets.layers import zeroed


class AttributeReader(nn.Module):
    """Scores of attributes in codes: a linear map and a residual network of `width` units beside it.

    A score is 0 where classifiers of decoded faces are undecided. Its unit is the deviation of their logits.
    """

    def __init__(self, z_dim: int, n_attributes: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(z_dim, n_attributes)
        self.first = nn.Linear(z_dim, width)
        self.second = nn.Linear(width, width)
        self.last = zeroed(nn.Linear(width, n_attributes))

    def forward(self, z: Tensor) -> Tensor:
        """Return scores [B, A] of standardised codes [B, D]."""
        hidden = F.silu(self.first(z))
        hidden = hidden + F.silu(self.second(hidden))
        return self.linear(z) + self.last(hidden)

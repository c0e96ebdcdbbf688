"""Attention: rows of vectors look at other rows and add what they find.

The rows are positions of a feature map or attributes. Every image is looked at alone, so no step
depends on how ranks share the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.nets.layers import mlp, norm, zeroed

POSITION_SCALE = 0.02  # deviation of the position vectors at the start


class Attention(nn.Module):
    """Attention with four heads, or fewer if the width needs it (arXiv 1706.03762); it starts at zero."""

    def __init__(self, width: int, seen_width: int) -> None:
        super().__init__()
        self.heads = next(n for n in (4, 2, 1) if width % n == 0)
        self.query = nn.Linear(width, width, bias=False)
        self.seen = nn.Linear(seen_width, 2 * width, bias=False)
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Rows x [B, N, W] look at rows seen [B, M, V] -> [B, N, W]."""
        key, value = self.seen(seen).chunk(2, dim=2)
        query, key, value = (self._heads(rows) for rows in (self.query(x), key, value))
        found = F.scaled_dot_product_attention(query, key, value)
        return self.out(found.transpose(1, 2).flatten(2))

    def _heads(self, rows: Tensor) -> Tensor:
        """[B, N, W] -> [B, heads, N, W / heads]."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


class PositionAttention(nn.Module):
    """Positions of a feature map look at the attributes, or at each other. It starts as the identity.

    A learned vector tells each position where it is. `token_width` is the width of an attribute's
    vector in e(y); with 0 the positions look at each other.
    """

    def __init__(self, channels: int, side: int, token_width: int = 0) -> None:
        super().__init__()
        self.token_width = token_width
        self.norm = norm("group", channels)
        self.position = nn.Parameter(POSITION_SCALE * torch.randn(side * side, channels))
        self.attention = Attention(channels, token_width or channels)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, C, H, W], e [B, E] -> [B, C, H, W]."""
        rows = self.norm(x).flatten(2).transpose(1, 2) + self.position
        seen = e.unflatten(1, (-1, self.token_width)) if self.token_width else rows
        found = self.attention(rows, seen)
        return x + found.transpose(1, 2).unflatten(2, x.shape[2:])


class TransformerBlock(nn.Module):
    """Rows look at each other, then a small network changes each. It starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.net = mlp(width, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, W] -> [B, N, W]."""
        rows = self.norm1(x)
        x = x + self.attention(rows, rows)
        return x + self.net(self.norm2(x))

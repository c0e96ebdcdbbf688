"""Conditioners: they turn binary attributes y [B, A] in {0, 1} into a vector e(y) [B, E].

A new conditioner needs its class and its line in `CONDITIONERS`. Its attribute `width` is E.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvae.config import ConditionerConfig


class MultiHot(nn.Module):
    """One linear map of the attributes as signs +1 and -1, followed by SiLU."""

    def __init__(self, config: ConditionerConfig, n_attributes: int) -> None:
        super().__init__()
        self.width = config.width
        self.net = nn.Sequential(nn.Linear(n_attributes, config.width), nn.SiLU())

    def forward(self, y: Tensor) -> Tensor:
        """Map y [B, A] to e(y) [B, width]; y = 0.5 (unknown) has the sign 0."""
        return self.net(y + (y - 1))


class SharedEmbedding(nn.Module):
    """The paper's nn.Embedding(2, width), shared by all attributes.

    e(y) lists the vectors of all attributes one after another.
    """

    def __init__(self, config: ConditionerConfig, n_attributes: int) -> None:
        super().__init__()
        self.width = config.width * n_attributes
        self.embedding = nn.Embedding(2, config.width)

    def forward(self, y: Tensor) -> Tensor:
        """Map y [B, A] to e(y) [B, A * width]; y = 0.5 (unknown) lies halfway between the two vectors."""
        absent, present = self.embedding.weight
        return torch.lerp(absent, present, y.to(absent.dtype)[:, :, None]).flatten(1)


CONDITIONERS: dict[str, type[MultiHot] | type[SharedEmbedding]] = {
    "multi_hot": MultiHot,
    "embedding": SharedEmbedding,
}

"""Conditioners: binary attributes y [B, A] in {0, 1} -> a vector e(y) [B, E]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvae.config import ConditionerConfig


class MultiHot(nn.Module):
    """One linear map of the signs +-1 of all attributes, then SiLU."""

    def __init__(self, config: ConditionerConfig, n_attributes: int) -> None:
        super().__init__()
        self.width = config.width
        self.net = nn.Sequential(nn.Linear(n_attributes, config.width), nn.SiLU())

    def forward(self, y: Tensor) -> Tensor:
        """y [B, A] -> e [B, width]."""
        return self.net(2 * y - 1)


class SharedEmbedding(nn.Module):
    """The paper's nn.Embedding(2, width), one for all attributes; e(y) lists the attributes' vectors one after another."""

    def __init__(self, config: ConditionerConfig, n_attributes: int) -> None:
        super().__init__()
        self.width = config.width * n_attributes
        self.embedding = nn.Embedding(2, config.width)

    def forward(self, y: Tensor) -> Tensor:
        """y [B, A] -> e [B, A * width]."""
        return self.embedding(y.to(torch.int64)).flatten(1)


CONDITIONERS: dict[str, type[MultiHot] | type[SharedEmbedding]] = {
    "multi_hot": MultiHot,
    "embedding": SharedEmbedding,
}

"""Conditioners: they turn binary attributes y [B, A] in {0, 1} into a vector e(y) [B, E].

A new conditioner needs its class and its line in `CONDITIONERS`. Its attribute `width` is E.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import ConditionerConfig
from cvae.nets.attention import TransformerBlock

UNKNOWN = 0.5  # value of an attribute that is not known


class MultiHot(nn.Module):
    """One linear map of the attributes as signs +1 and -1, followed by SiLU."""

    def __init__(self, config: ConditionerConfig, n_attributes: int) -> None:
        super().__init__()
        self.width = config.width
        self.net = nn.Sequential(nn.Linear(n_attributes, config.width), nn.SiLU())

    def forward(self, y: Tensor) -> Tensor:
        """Map y [B, A] to e(y) [B, width]; UNKNOWN has the sign 0."""
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


class AttributeTokens(nn.Module):
    """A learned vector for each attribute and value: absent, unknown, present.

    e(y) lists the vectors of all attributes one after another. Training shows no unknown attributes, so
    the unknown ones keep their start, zero; the stage `refine` fits a prior to it (attribute dropout).
    """

    def __init__(self, config: ConditionerConfig, n_attributes: int) -> None:
        super().__init__()
        self.width = config.width * n_attributes
        start = torch.randn(n_attributes, 3, config.width) / config.width**0.5  # of length 1
        start[:, 1] = 0
        self.tokens = nn.Parameter(start)

    def forward(self, y: Tensor) -> Tensor:
        """Map y [B, A] to e(y) [B, A * width]; between two of 0, 0.5 and 1 it interpolates linearly."""
        return self.rows(y).flatten(1)

    def rows(self, y: Tensor) -> Tensor:
        """Map y [B, A] to one vector per attribute [B, A, width]."""
        sign = (y + (y - 1)).to(self.tokens.dtype)
        shares = torch.stack((F.relu(-sign), 1 - sign.abs(), F.relu(sign)), dim=2)
        return torch.einsum("bas,asw->baw", shares, self.tokens)


class AttributeAttention(AttributeTokens):
    """Tokens that look at each other before they become e(y): what one attribute means depends on all."""

    def __init__(self, config: ConditionerConfig, n_attributes: int) -> None:
        super().__init__(config, n_attributes)
        self.layers = nn.Sequential(*(TransformerBlock(config.width) for _ in range(config.layers)))

    def rows(self, y: Tensor) -> Tensor:
        """Map y [B, A] to one vector per attribute [B, A, width]."""
        return self.layers(super().rows(y))


Conditioner = MultiHot | SharedEmbedding | AttributeTokens

CONDITIONERS: dict[str, type[Conditioner]] = {
    "multi_hot": MultiHot,
    "embedding": SharedEmbedding,
    "tokens": AttributeTokens,
    "attention": AttributeAttention,
}

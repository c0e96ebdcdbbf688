"""Decoder variances: sigma^2, one number for all pixels, on the [-1, 1] image scale.

See sigma-VAE, arXiv 2006.13202. A new variance needs its class and its line in `DECODER_VARIANCES`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvae.config import VarianceConfig


class UnitVariance(nn.Module):
    """sigma^2 = 1: the plain VAE."""

    def __init__(self, config: VarianceConfig) -> None:
        super().__init__()

    def forward(self, mse: Tensor) -> Tensor:
        """Map the MSE of the global batch [] to sigma^2 []."""
        return torch.ones_like(mse)


class LearnedVariance(nn.Module):
    """sigma^2 is a parameter."""

    def __init__(self, config: VarianceConfig) -> None:
        super().__init__()
        self.floor = config.floor
        self.log_s2 = nn.Parameter(torch.zeros(()))

    def forward(self, mse: Tensor) -> Tensor:
        """Map the MSE of the global batch [] to sigma^2 []."""
        return self.floor + self.log_s2.exp()


class OptimalVariance(nn.Module):
    """sigma*^2 = SSE / (N P) over the GLOBAL batch, the maximum-likelihood variance.

    It is a stationary point of the loss in sigma^2, so the gradient stays exact although sigma^2 is
    detached. The floor is exact on both sides.
    """

    def __init__(self, config: VarianceConfig) -> None:
        super().__init__()
        self.floor = config.floor

    def forward(self, mse: Tensor) -> Tensor:
        """Map the MSE of the global batch [] to sigma^2 []."""
        return mse.detach().clamp(min=self.floor)


DECODER_VARIANCES: dict[str, type[UnitVariance] | type[LearnedVariance] | type[OptimalVariance]] = {
    "unit": UnitVariance,
    "learned": LearnedVariance,
    "optimal": OptimalVariance,
}

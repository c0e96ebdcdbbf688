"""The anomaly score of a code: how unlike the training images the decoder draws it.

A prior draws a code now and then that decodes to a face with smeared eyes. Such a code looks odd inside the
decoder: the feature map f of its middle level, averaged over a grid of cells, is normal with mean m_c and
covariance C_c at cell c over the codes of training images (PaDiM, arXiv 2011.08785). The score is

    a(z, y) = mean over c of (f_c - m_c)^T (C_c + damping)^-1 (f_c - m_c)

`draw_again` draws another code while a is above the mean of the training images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.nets.layers import full_precision
from cvae.nets.shapes import middle_map

CELLS = 8  # of a side of the grid, or as many as the map has
DAMPING = 0.01  # added to the diagonal of a covariance, in its mean


class AnomalyScore(nn.Module):
    """Means and inverse covariances of feature maps [B, C, H, W]; `refine` and `steer` fit them."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = min(side, CELLS)
        cells = self.side**2
        self.mean: Tensor
        self.precision: Tensor
        self.usual: Tensor
        self.register_buffer("mean", torch.zeros(cells, channels))
        self.register_buffer("precision", torch.zeros(cells, channels, channels))
        self.register_buffer("usual", torch.zeros(()))  # the mean score of training images

    def cells(self, features: Tensor) -> Tensor:
        """Average feature maps [B, C, H, W] over cells: [cells, B, C]."""
        return F.adaptive_avg_pool2d(full_precision(features), self.side).flatten(2).permute(2, 0, 1)

    def fit(self, mean: Tensor, second: Tensor) -> None:
        """Take over the means over images, float64, of f [cells, C] and of f f^T [cells, C, C]."""
        covariance = second - mean[:, :, None] * mean[:, None, :]
        power = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        damping = DAMPING * power[:, None, None] * torch.eye(mean.shape[1]).to(mean)
        precision = torch.linalg.inv(covariance + damping)
        self.mean.copy_(mean)
        self.precision.copy_(precision)
        self.usual.copy_((precision * covariance).sum((1, 2)).mean())

    def forward(self, features: Tensor) -> Tensor:
        """Return the score [B] of feature maps [B, C, H, W], less the mean of training images."""
        away = self.cells(features) - self.mean[:, None]
        return ((away @ self.precision) * away).sum(2).mean(0) - self.usual


def anomaly_score(config: ModelConfig, image_size: int) -> AnomalyScore | None:
    """Return the score that a model's configuration asks for, or None."""
    if not config.prior.anomaly:
        return None
    return AnomalyScore(*middle_map(config, image_size))


def draw_again(
    noise: Tensor, code: Callable[[Tensor, Tensor], Tensor], score: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the noise and the code [B, D] of one sample for each row of noise [B, tries, D].

    A code is drawn again while its score is above 0. If no try ends that, the least anomalous one is kept.
    `code` turns the noise [b, D] of the rows with positions [b] into codes, `score` rates codes of rows.
    """
    rows = torch.arange(len(noise), device=noise.device)
    kept = noise[:, 0]
    codes = code(kept, rows)
    if noise.shape[1] == 1:
        return kept, codes
    kept, lowest = kept.clone(), score(codes, rows)
    for again in noise.unbind(1)[1:]:
        rows = (lowest > 0).nonzero()[:, 0]
        if not len(rows):
            break
        others = code(again[rows], rows)
        found = score(others, rows)
        better = found < lowest[rows]
        won = rows[better]
        kept[won], codes[won], lowest[won] = again[won], others[better], found[better]
    return kept, codes

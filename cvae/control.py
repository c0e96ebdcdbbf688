"""Control in the space of codes: linear scores of the attributes, and moves that change one of them.

z carries nearly everything that an image shows, so a prior and a decoder hardly react to one attribute
of the request. A linear score reads each attribute from z, and a gain says how to move z so that one
score changes and the others stay. Both follow in closed form from the moments of codes and labels:

    A = (C + ridge_z diag C)^-1 cov(z, y)            least squares; rows are scaled, see `scores`
    K = C A^T (A C A^T + ridge diag(A C A^T))^-1     the likeliest move; scaled, mean of A_k K_k = 1

C is the covariance of the codes. With ridge = 0, a move keeps every other score exactly. It then leaves
the likely codes, and a classifier that was not fitted sees more side effects than with ridge = 1. The
ridge also shrinks the moves of attributes that a score reads poorly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

RIDGE_CODES = 0.02  # of the least squares
RIDGE_SCORES = 1.0  # of the gain
ROUNDS = 3  # of `obey`: attributes share the directions in which they move a code
STEP = 0.7  # of one round


class CodeMoments(NamedTuple):
    """Means over images, float64, of z, y, z z^T and z y^T."""

    z: Tensor  # [D]
    y: Tensor  # [A]
    zz: Tensor  # [D, D]
    zy: Tensor  # [D, A]


class AttributeControl(nn.Module):
    """Scores and gains of A attributes in codes of D dimensions. The stage `refine` fits them."""

    def __init__(self, z_dim: int, n_attributes: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.gain: Tensor
        self.register_buffer("weight", torch.zeros(n_attributes, z_dim))
        self.register_buffer("bias", torch.zeros(n_attributes))
        self.register_buffer("gain", torch.zeros(n_attributes, z_dim))

    def fit(self, moments: CodeMoments) -> None:
        """Compute scores and gains. An attribute that all or no images have moves nothing."""
        covariance = moments.zz - torch.outer(moments.z, moments.z)
        with_labels = moments.zy - torch.outer(moments.z, moments.y)
        damped = covariance + RIDGE_CODES * torch.diag(covariance.diag())
        weight = torch.linalg.solve(damped, with_labels).T

        # A score's class means differ by A_k cov(z, y_k) / var(y_k); half of it becomes 1.
        variance = moments.y * (1 - moments.y)
        seen = variance > 0
        distance = (weight * with_labels.T).sum(1) / variance.clamp_min(1e-12)
        weight = weight * torch.where(seen, 2 / distance.clamp_min(1e-12), 0)[:, None]
        # The class means are bias + A m_1 and bias + A m_0; the middle between them becomes 0.
        middle = weight @ moments.z + (1 - 2 * moments.y)
        bias = torch.where(seen, -middle, 0)

        spread = weight @ covariance @ weight.T
        spread = spread + torch.diag(RIDGE_SCORES * spread.diag() + (~seen).to(spread))
        gain = torch.linalg.solve(spread, weight @ covariance)
        own = (weight * gain).sum(1)[seen].mean().clamp_min(1e-12)
        gain = torch.where(seen[:, None], gain / own, 0)
        for buffer, value in ((self.weight, weight), (self.bias, bias), (self.gain, gain)):
            buffer.copy_(value)

    def scores(self, z: Tensor) -> Tensor:
        """Return scores [B, A] of codes [B, D]: on average 1 where an attribute is present, else -1."""
        return z @ self.weight.T + self.bias

    def edit(self, z: Tensor, before: Tensor, after: Tensor, strength: float = 1.0) -> Tensor:
        """Move codes [B, D] so that attributes whose value in y [B, A] changes reach their new score.

        The new score is `strength` times that of an average image with the new value. A score that is
        already beyond it stays.
        """
        sign = 2 * after - 1
        missing = (strength - sign * self.scores(z)).clamp_min(0)
        changed = (before != after).to(z)
        return z + (changed * sign * missing) @ self.gain

    def obey(self, z: Tensor, y: Tensor, margin: float) -> Tensor:
        """Move codes [B, D] until each score is about `margin` on its side of y [B, A].

        Attributes with y = 0.5 (not known, or nobody asked for them) are left alone. 1 is the score of an
        average image.
        """
        sign = 2 * y - 1
        for _ in range(ROUNDS):
            missing = (margin - sign * self.scores(z)).clamp_min(0)
            z = z + STEP * (sign * missing) @ self.gain
        return z

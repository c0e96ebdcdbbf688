"""Control in the space of codes: linear scores of the attributes, and moves that change one of them.

z carries nearly everything that an image shows, so a prior and a decoder hardly react to one attribute
of the request. A linear score reads each attribute from z, and a gain says how to move z so that one
score changes and the others stay. Both follow in closed form from the moments of codes and labels:

    A = (C + ridge_z diag C)^-1 cov(z, y)            least squares; rows are scaled, see `scores`
    K = C A^T (A C A^T + ridge diag(A C A^T))^-1     the likeliest move; scaled, mean of A_k K_k = 1

C is the covariance of the codes. With ridge = 0, a move keeps every other score exactly. It then leaves
the likely codes, and a classifier that was not fitted sees more side effects than with ridge = 1. The
ridge also shrinks the moves of attributes that a score reads poorly.

The stage `steer` adds a network r that predicts what classifiers see in a decoded code. A code then goes
from h, where the move in closed form of the same strength leads, towards the minimum of

    (strength - s r_k(z'))_+^2 + KEEP sum_{j != k} |P(r_j(z')) - P(r_j(z))| + SHORT |z' - h|_C^2

for each changed attribute k with the sign s of its new value. P, the normal distribution, is the chance of
a yes from a classifier whose scores differ from r by one deviation; |.|_C is the distance in deviations of C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cvae.config import ModelConfig
from cvae.nets.reader import AttributeReader

RIDGE_CODES = 0.02  # of the least squares
RIDGE_SCORES = 1.0  # of the gain
ROUNDS = 3  # of `obey`: attributes share the directions in which they move a code
STEP = 0.7  # of one round
DESCENT = 15  # steps of Adam to the minimum
RATE = 0.05  # of these steps, in deviations of the codes
DECAYS = (0.8, 0.95)  # of Adam's running means
KEEP = 3.0  # weight of the decisions that should stay
SMOOTH = 1e-3  # added to a squared difference before its root, which has no gradient at 0
SHORT = 0.2  # weight of the distance
JITTER = 1e-4  # share of its diagonal that is added to C before it is factorised


class CodeMoments(NamedTuple):
    """Means over images, float64, of z, y, z z^T and z y^T."""

    z: Tensor  # [D]
    y: Tensor  # [A]
    zz: Tensor  # [D, D]
    zy: Tensor  # [D, A]


class AttributeControl(nn.Module):
    """Scores and gains of A attributes in codes of D dimensions. The stage `refine` fits them.

    `reader`: units of the network of the stage `steer`; 0: there is none.
    """

    def __init__(self, z_dim: int, n_attributes: int, reader: int = 0) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.gain: Tensor
        self.register_buffer("weight", torch.zeros(n_attributes, z_dim))
        self.register_buffer("bias", torch.zeros(n_attributes))
        self.register_buffer("gain", torch.zeros(n_attributes, z_dim))
        self.reader: AttributeReader | None = None
        if reader:
            self.reader = AttributeReader(z_dim, n_attributes, reader)
            self.mean: Tensor
            self.factor: Tensor
            self.register_buffer("mean", torch.zeros(z_dim))
            self.register_buffer("factor", torch.eye(z_dim))  # L of C = L L^T

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
        if self.reader is not None:
            self.mean.copy_(moments.z)
            damped = covariance + JITTER * torch.diag(covariance.diag())
            self.factor.copy_(torch.linalg.cholesky(damped))

    def read(self, z: Tensor) -> Tensor:
        """Return what the network reads in codes [B, D]: scores [B, A], 0 where it is undecided."""
        assert self.reader is not None
        deviation = self.factor.square().sum(1).sqrt()
        return self.reader((z - self.mean) / deviation)

    def scores(self, z: Tensor) -> Tensor:
        """Return scores [B, A] of codes [B, D]: on average 1 where an attribute is present, else -1."""
        return z @ self.weight.T + self.bias

    def edit(self, z: Tensor, before: Tensor, after: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """Move codes [B, D] so that attributes whose value in y [B, A] changes reach their new score.

        The new score is `strength`: times that of an average image with the new value, or, if there is a
        network, deviations beyond the decision. A score that is already beyond it stays.
        """
        if self.reader is None:
            return self.edit_linearly(z, before, after, strength)
        return self._descend(z, before, after, strength)

    def edit_linearly(self, z: Tensor, before: Tensor, after: Tensor, strength: float | Tensor) -> Tensor:
        """Move codes [B, D] along the gains; `strength` may be one number a code [B, 1]."""
        sign = 2 * after - 1
        missing = (strength - sign * self.scores(z)).clamp_min(0)
        changed = (before != after).to(z)
        return z + (changed * sign * missing) @ self.gain

    def _descend(self, z: Tensor, before: Tensor, after: Tensor, strength: float | Tensor) -> Tensor:
        """Follow the gradient of what the network reads, near the move in closed form."""
        sign, changed = 2 * after - 1, (before != after).to(z)
        start = self.read(z)
        linear = self.edit_linearly(z, before, after, strength) - z
        home = torch.linalg.solve_triangular(self.factor, linear.T, upper=False).T.contiguous()
        move, mean, square = home, torch.zeros_like(home), torch.zeros_like(home)
        for step in range(1, DESCENT + 1):
            with torch.enable_grad():
                move = move.detach().requires_grad_()
                scores = self.read(z + move @ self.factor.T)
                missing = (strength - sign * scores).clamp_min(0)
                cost = changed * missing.square() + KEEP * (1 - changed) * turned(start, scores)
                (gradient,) = torch.autograd.grad(cost.sum() + SHORT * (move - home).square().sum(), move)
            # Adam, written out: each code has its own descent, whatever else is in the batch.
            mean = torch.lerp(gradient, mean, DECAYS[0])
            square = torch.lerp(gradient.square(), square, DECAYS[1])
            first, second = (1 - decay**step for decay in DECAYS)
            move = move.detach() - RATE * (mean / first) / ((square / second).sqrt() + 1e-8)
        return torch.where(changed.any(1, keepdim=True), z + move @ self.factor.T, z)

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


def turned(before: Tensor, after: Tensor) -> Tensor:
    """Return the chance that a decision on scores `before` is another one on scores `after` (smoothed)."""
    change = torch.special.ndtr(after) - torch.special.ndtr(before)
    return (change.square() + SMOOTH).sqrt()


def attribute_control(config: ModelConfig, n_attributes: int) -> AttributeControl | None:
    """Return the control that a model's configuration asks for, or None."""
    if not config.prior.control:
        return None
    return AttributeControl(config.z_dim, n_attributes, config.prior.reader)

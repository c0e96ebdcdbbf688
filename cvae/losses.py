"""The objective: per image and in nats, log p(x|y) >= E_q[log p(x|z,y)] - KL(q(z|x,y) || p(z|y))."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.layers import full_precision


class Sums(NamedTuple):
    """Sums over the images of one rank or, reduced, of the global batch (nats; squared errors on the [-1, 1] scale)."""

    sse: Tensor
    kl: Tensor
    log_det: Tensor
    images: Tensor


class Losses(NamedTuple):
    """Loss terms of the global batch in nats per image; only `objective` carries a gradient, that of this rank's images.

    loss = nll + beta * kl. `objective` is this rank's part times W (DDP averages over W ranks), in nats per DIMENSION.
    """

    objective: Tensor
    loss: Tensor
    nll: Tensor
    kl: Tensor
    log_det: Tensor
    mse: Tensor  # on the [-1, 1] scale
    s2: Tensor


def squared_error(x: Tensor, mean: Tensor) -> Tensor:
    """Sum over an image's pixels of (x - mean)^2, [B, 3, H, W] -> [B], in at least float32: half types lose small errors."""
    return (full_precision(x) - full_precision(mean)).square().flatten(1).sum(1)


def gaussian_nll(sse: Tensor, images: Tensor | int, s2: Tensor | float, pixels: int) -> Tensor:
    """-log p(x|z,y) = SSE/(2 s2) + images * (P/2) ln(2 pi s2), nats."""
    s2 = torch.as_tensor(s2, dtype=sse.dtype, device=sse.device)
    return sse / (2 * s2) + images * (pixels / 2) * (2 * math.pi * s2).log()


def combine(local: Sums, total: Sums, s2: Tensor, beta: float, scale: float, pixels: int) -> Losses:
    """Local sums (with gradient) and global sums (without) -> losses; `scale` = W / N, ranks over images of the global batch."""
    s2_local = s2.to(local.sse.dtype)
    objective = (gaussian_nll(local.sse, local.images, s2_local, pixels) + beta * local.kl) * (scale / pixels)
    n = total.images
    nll, kl = gaussian_nll(total.sse, n, s2.detach(), pixels) / n, total.kl / n
    return Losses(
        objective, nll + beta * kl, nll, kl, total.log_det / n, total.sse / (n * pixels), s2.detach()
    )


def bits_per_dim(nats: float, pixels: int) -> float:
    """Nats per image on the [-1, 1] scale -> bits per dimension of the 256 grey levels: one level is 2/255 wide."""
    return nats / (pixels * math.log(2)) + math.log2(127.5)


def active_units(images: int, sum_mean: Tensor, sum_mean_sq: Tensor, sum_variance: Tensor) -> int:
    """Latent units that carry information: Var_x(E_q[z_d]) above 1 % of the unit's total variance.

    Burda's criterion (arXiv 1509.00519) made independent of the scale of z, which a learned prior does not fix.
    All arguments are sums over `images` images, [D].
    """
    between = sum_mean_sq / images - (sum_mean / images).square()
    return int((between > 0.01 * (between + sum_variance / images)).sum())

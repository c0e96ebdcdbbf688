"""The objective, per image and in nats: the negative ELBO and whatever terms are added to it.

    log p(x|y) >= E_q[log p(x|z,y)] - KL(q(z|x,y) || p(z|y)) = -(nll + kl)
    objective = nll + beta * kl + sum over LOSS_TERMS of weight * term

A loss term takes its class, its line in `LOSS_TERMS` and its section in `LossConfig`. Training,
validation and the curves report it under its name.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import LossConfig
from cvae.distributions import DiagonalGaussian
from cvae.nets.layers import full_precision
from cvae.nets.perceptual import load_features, relative_distance, style_distance

Sums = dict[str, Tensor]  # over images: their number "images", and each name of `Terms.values`, []


class Terms(NamedTuple):
    """One forward pass of the model."""

    q: DiagonalGaussian
    values: dict[str, Tensor]  # [B] each: "sse" on the [-1, 1] scale; "kl", "log_det", terms: nats


class Losses(NamedTuple):
    """The losses of one global batch."""

    objective: Tensor  # this rank's part times W (DDP averages over W ranks), nats per DIMENSION
    values: dict[str, Tensor]  # see `means`; without gradient, the same on every rank


class LossTerm(nn.Module):
    """A named term of the objective.

    `config` is the term's section: its `weight`, 0 to leave the term out, and what else it needs.
    Parameters of a term are trained and saved with the model. A network that is only used belongs
    into a `Frozen`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, images: Tensor, decoded: Tensor, y: Tensor) -> Tensor:
        """Map images, their reconstructions [B, 3, S, S] in [-1, 1] and y [B, A] to nats [B]."""
        raise NotImplementedError


class Frozen:
    """A network that is used and never trained; it is no part of the model's parameters and state.

    It follows its input's device and dtype. Copies of a model share it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> Any:
        """Apply the network; gradients flow to `x`."""
        return self.network.to(x.device, x.dtype)(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self


class Edges(LossTerm):
    """Half the squared error of the images' Laplacians; it punishes blur more than the ELBO."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.laplacian: Tensor
        laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        self.register_buffer("laplacian", laplacian.view(1, 1, 3, 3), persistent=False)

    def forward(self, images: Tensor, decoded: Tensor, y: Tensor) -> Tensor:
        """Return 1/2 sum (L x - L mean)^2 with L = [[0, 1, 0], [1, -4, 1], [0, 1, 0]] -> [B]."""
        error = (full_precision(images) - full_precision(decoded)).flatten(0, 1).unsqueeze(1)
        filtered = F.conv2d(error, self.laplacian.to(error.dtype))
        return 0.5 * filtered.square().view(len(images), -1).sum(1)


class Perceptual(LossTerm):
    """Distance of an ImageNet network's features; blur and haze cost more than in squared error.

    The network is read at the first use: a model that only samples needs no weights of it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.features: Frozen | None = None

    def forward(self, images: Tensor, decoded: Tensor, y: Tensor) -> Tensor:
        """Return P times the distance of features -> [B], so that weight 1 is one nat per dimension."""
        images, decoded = full_precision(images), full_precision(decoded)
        if self.features is None:
            self.features = Frozen(load_features(self.config.network, self.config.size))
        with torch.no_grad():
            wanted = self.features(images)
        found = self.features(decoded)
        distance = relative_distance(wanted, found)
        if self.config.style:
            distance = distance + self.config.style * style_distance(wanted, found)
        return images[0].numel() * distance


LOSS_TERMS: dict[str, type[LossTerm]] = {"edges": Edges, "perceptual": Perceptual}


def loss_weights(config: LossConfig) -> dict[str, float]:
    """Return the weights of the terms in use, by name."""
    weights = {name: getattr(config, name).weight for name in LOSS_TERMS}
    return {name: weight for name, weight in weights.items() if weight}


def loss_terms(config: LossConfig) -> nn.ModuleDict:
    """Build the terms in use, by name."""
    return nn.ModuleDict({name: LOSS_TERMS[name](getattr(config, name)) for name in loss_weights(config)})


def squared_error(x: Tensor, mean: Tensor) -> Tensor:
    """Return the sum over pixels of (x - mean)^2, [B, 3, H, W] -> [B], in at least float32.

    Half types would round small errors to 0.
    """
    return (full_precision(x) - full_precision(mean)).square().flatten(1).sum(1)


def gaussian_nll(sse: Tensor, images: Tensor | int, s2: Tensor | float, pixels: int) -> Tensor:
    """Return -log p(x|z,y) = SSE/(2 s2) + images * (P/2) ln(2 pi s2), nats."""
    s2 = torch.as_tensor(s2, dtype=sse.dtype, device=sse.device)
    return sse / (2.0 * s2) + images * (pixels / 2) * (2 * math.pi * s2).log()


def pack(sums: Sums) -> Tensor:
    """Return sums as one float64 vector without gradient, for one all-reduce."""
    return torch.stack(list(sums.values())).detach().double()


def unpack(vector: Tensor, names: Sums) -> Sums:
    """Undo `pack`: give the entries of `vector` the keys of `names`."""
    return dict(zip(names, vector, strict=True))


def objective(
    local: Sums, s2: Tensor, pixels: int, beta: float | Tensor, weights: dict[str, float], scale: float
) -> Tensor:
    """Return nll + beta * kl + the weighted terms of this rank's images, [], nats per dimension.

    `scale`: ranks / images of the global batch.
    """
    s2 = s2.to(local["sse"].dtype)
    nats = gaussian_nll(local["sse"], local["images"], s2, pixels) + beta * local["kl"]
    for name, weight in weights.items():
        nats = nats + weight * local[name]
    return nats * (scale / pixels)


def means(
    total: Sums, s2: Tensor, pixels: int, beta: float | Tensor = 1.0, weights: dict[str, float] | None = None
) -> dict[str, Tensor]:
    """Return the values of an average image by the names of their metrics.

    `loss` = nll + beta * kl + the weighted terms; by default it is the negative ELBO.
    `mse` is on the [0, 1] scale, `sigma` on the [-1, 1] scale; everything else is in nats.
    """
    n = total["images"]
    nll = gaussian_nll(total["sse"], n, s2, pixels) / n
    named = {name: value / n for name, value in total.items() if name not in ("sse", "images")}
    loss = nll + beta * named["kl"]
    for name, weight in (weights or {}).items():
        loss = loss + weight * named[name]
    mse = total["sse"] / (n * (4.0 * pixels))  # [-1, 1] -> [0, 1] halves an error
    return {"loss": loss, "nll": nll, **named, "mse": mse, "sigma": s2.sqrt()}


def bits_per_dim(nats: float, pixels: int) -> float:
    """Convert nats per image on the [-1, 1] scale to bits per dimension of the 256 grey levels.

    One level is 2/255 wide on the [-1, 1] scale.
    """
    return nats / (pixels * math.log(2)) + math.log2(127.5)


def active_units(images: int, sum_mean: Tensor, sum_mean_sq: Tensor, sum_variance: Tensor) -> int:
    """Count the latent units with Var_x(E_q[z_d]) above 1 % of the unit's total variance.

    This is Burda's criterion (arXiv 1509.00519) made independent of the scale of z, which a learned
    prior does not fix. All arguments are sums over `images` images, [D].
    """
    between = sum_mean_sq / images - (sum_mean / images).square()
    return int((between > 0.01 * (between + sum_variance / images)).sum())

"""ELBO of held-out images in fixed blocks: the same numbers on any number of ranks, up to the order of float64 sums."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cvae.distributions import kl_divergence
from cvae.losses import active_units, bits_per_dim, gaussian_nll, squared_error
from cvae.model import CVAE
from pipeline.data.loader import attribute_positions, to_float
from pipeline.data.shards import Shards
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.keyed import generator, keyed_normal
from pipeline.runtime.split import share

BLOCK = 64  # images per forward pass; part of the protocol
CALIBRATION_IMAGES = 2048


@dataclass(frozen=True)
class HeldOut:
    """A fixed part of a split, in a fixed order, with each image's own encoder noise."""

    shards: Shards
    indices: np.ndarray
    columns: list[int]  # attributes read by the model
    purpose: str  # of the noise

    def blocks(self, ranks: Ranks, z_dim: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's whole blocks: x [b, 3, S, S] in [-1, 1], y [b, A], noise [b, D]."""
        starts = range(0, len(self.indices), BLOCK)
        for block in share(len(starts), ranks.rank, ranks.world_size):
            mine = self.indices[starts[block] : starts[block] + BLOCK]
            images, attributes = self.shards.gather(mine)
            noise = keyed_normal(0, self.purpose, mine, (z_dim,))
            x = to_float(torch.from_numpy(images).to(ranks.device), dtype)
            yield (
                x,
                torch.from_numpy(attributes[:, self.columns]).to(ranks.device, dtype),
                noise.to(ranks.device, dtype),
            )


def whole_split(shards: Shards, attributes: list[str]) -> HeldOut:
    """Every image of a split."""
    return HeldOut(shards, np.arange(len(shards)), attribute_positions(shards.attribute_names, attributes), "validation")


def calibration_part(shards: Shards, attributes: list[str]) -> HeldOut:
    """2,048 fixed images of the training split, on which the decoder variance of finished weights is fitted."""
    chosen = np.sort(generator(0, "calibration", 0).permutation(len(shards))[:CALIBRATION_IMAGES])
    return HeldOut(shards, chosen, attribute_positions(shards.attribute_names, attributes), "calibration")


@torch.no_grad()
def elbo_sums(model: CVAE, part: HeldOut, ranks: Ranks) -> dict[str, Tensor]:
    """Sums over all images of `part` on every rank, float64 (all ranks take part): sse, kl, log_det, images, moments of q."""
    parameter = next(model.parameters())
    names = ("sse", "kl", "log_det", "images")
    total = torch.zeros(len(names) + 3 * model.z_dim, dtype=torch.float64, device=ranks.device)
    extremes = torch.full(
        (2,), -math.inf, dtype=torch.float64, device=ranks.device
    )  # of -log_det and log_det
    for x, y, noise in part.blocks(ranks, model.z_dim, parameter.dtype):
        q = model.encode(x, y)
        z = q.sample(noise)
        kl, log_det = kl_divergence(q, model.prior(y), z)
        sse = squared_error(x, model.decode(z, y))
        scalars = torch.stack([t.double().sum() for t in (sse, kl, log_det, torch.ones_like(sse))])
        moments = torch.cat([m.double().sum(0) for m in (q.mean, q.mean.square(), (2 * q.log_std).exp())])
        total += torch.cat([scalars, moments])
        extremes = torch.maximum(extremes, torch.stack([(-log_det).max(), log_det.max()]).double())
    total = ranks.reduce_sum(total)
    if ranks.world_size > 1:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    sums = dict(zip(names, total[:4], strict=True))
    sums |= dict(zip(("mean", "mean_sq", "variance"), total[4:].view(3, -1), strict=True))
    return sums | {"log_det_min": -extremes[0], "log_det_max": extremes[1]}


def validate(model: CVAE, held_out: HeldOut, calibration: HeldOut, ranks: Ranks) -> dict[str, float]:
    """Loss terms at beta = 1 with the variance fitted on training images (all ranks take part); nats per image.

    `s2` is the model's decoder variance, `s2_fit` = SSE / (N P) of the calibration images; mse is on the [0, 1] scale.
    """
    fit = elbo_sums(model, calibration, ranks)
    s2_fit = fit["sse"] / (fit["images"] * model.pixels)
    s2 = model.variance(s2_fit).detach()
    sums = elbo_sums(model, held_out, ranks)
    n = sums["images"]
    nll, kl = gaussian_nll(sums["sse"], n, s2, model.pixels) / n, sums["kl"] / n
    values = {"loss": nll + kl, "nll": nll, "kl": kl, "mse": sums["sse"] / (n * model.pixels * 4)}
    values |= {"s2": s2, "s2_fit": s2_fit, "sigma": s2.sqrt(), "log_det_mean": sums["log_det"] / n}
    values |= {name: sums[name] for name in ("log_det_min", "log_det_max")}
    numbers = {k: float(v) for k, v in values.items()}
    numbers["bits_per_dim"] = bits_per_dim(numbers["loss"], model.pixels)
    numbers["active_units"] = active_units(int(n), sums["mean"], sums["mean_sq"], sums["variance"])
    return numbers

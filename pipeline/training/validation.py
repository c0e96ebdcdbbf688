"""The ELBO of held-out images, in fixed blocks.

Any number of ranks gives the same values, up to the order of float64 sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cvae.losses import Sums, active_units, bits_per_dim, means
from cvae.model import CVAE
from pipeline.data.loader import attribute_positions, to_float
from pipeline.data.shards import Shards
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.keyed import generator, keyed_normal
from pipeline.runtime.split import ceil_div, share

BLOCK = 64  # images per forward pass; part of the protocol
CALIBRATION_IMAGES = 2048


@dataclass(frozen=True)
class HeldOut:
    """A fixed part of a split in a fixed order; each image has its own encoder noise."""

    shards: Shards
    indices: np.ndarray  # positions in the split
    columns: list[int]  # attributes that the model reads
    purpose: str  # key of the noise

    def blocks(self, ranks: Ranks, z_dim: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's blocks: x [b, 3, S, S] in [-1, 1], y [b, A], noise [b, D]."""
        n_blocks = ceil_div(len(self.indices), BLOCK)
        for block in share(n_blocks, ranks.rank, ranks.world_size):
            chosen = self.indices[block * BLOCK : (block + 1) * BLOCK]
            images, attributes = self.shards.gather(chosen)
            noise = keyed_normal(0, self.purpose, chosen, (z_dim,))
            x = to_float(torch.from_numpy(images).to(ranks.device), dtype)
            y = torch.from_numpy(attributes[:, self.columns])
            yield x, y.to(ranks.device, dtype), noise.to(ranks.device, dtype)


def whole_split(shards: Shards, attributes: list[str]) -> HeldOut:
    """Return every image of a split."""
    positions = attribute_positions(shards.attribute_names, attributes)
    return HeldOut(shards, np.arange(len(shards)), positions, "validation")


def calibration_part(shards: Shards, attributes: list[str]) -> HeldOut:
    """Return 2,048 fixed training images, on which the decoder variance of given weights is fitted."""
    order = generator(0, "calibration", 0).permutation(len(shards))
    chosen = np.sort(order[:CALIBRATION_IMAGES])
    positions = attribute_positions(shards.attribute_names, attributes)
    return HeldOut(shards, chosen, positions, "calibration")


@dataclass
class Totals:
    """Sums over the images of one part, float64, the same on every rank."""

    terms: Sums  # of `CVAE.terms`, and "images"
    mean: Tensor  # sum of q's mean [D]
    mean_sq: Tensor  # sum of its square [D]
    variance: Tensor  # sum of q's variance [D]
    log_det_min: Tensor  # smallest log|det df/dz| of an image
    log_det_max: Tensor


@torch.no_grad()
def totals(model: CVAE, part: HeldOut, ranks: Ranks) -> Totals:
    """Run the model on all images of `part` (all ranks)."""
    dtype = next(model.parameters()).dtype
    names = (*model.term_names, "images")
    sums = torch.zeros(len(names) + 3 * model.z_dim, dtype=torch.float64, device=ranks.device)
    extremes = torch.full((2,), -math.inf, dtype=torch.float64, device=ranks.device)  # -min and max
    for x, y, noise in part.blocks(ranks, model.z_dim, dtype):
        q, values = model.terms(x, y, noise)
        log_det = values["log_det"]
        per_image = [values[name] for name in model.term_names]
        scalars = [value.double().sum() for value in (*per_image, torch.ones_like(log_det))]
        moments = [m.double().sum(0) for m in (q.mean, q.mean.square(), (2 * q.log_std).exp())]
        sums += torch.cat([torch.stack(scalars), *moments])
        extremes = torch.maximum(extremes, torch.stack([(-log_det).max(), log_det.max()]).double())

    sums = ranks.reduce_sum(sums)
    if ranks.world_size > 1:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    terms = dict(zip(names, sums[: len(names)], strict=True))
    mean, mean_sq, variance = sums[len(names) :].view(3, -1)
    return Totals(terms, mean, mean_sq, variance, -extremes[0], extremes[1])


def validate(model: CVAE, held_out: HeldOut, calibration: HeldOut, ranks: Ranks) -> dict[str, float]:
    """Return the values of the held-out images, nats per image (all ranks).

    `loss` is the negative ELBO: further loss terms have their own names and are not in it. The decoder
    variance `s2` is the model's own; an optimal one is fitted on the calibration images, for which
    `s2_fit` = SSE / (N P). `mse` is on the [0, 1] scale.
    """
    fit = totals(model, calibration, ranks).terms
    s2_fit = fit["sse"] / (fit["images"] * model.pixels)
    s2 = model.variance(s2_fit).detach()
    found = totals(model, held_out, ranks)
    values = means(found.terms, s2, model.pixels)
    values["log_det_mean"] = values.pop("log_det")
    values |= {"log_det_min": found.log_det_min, "log_det_max": found.log_det_max}
    values |= {"s2": s2, "s2_fit": s2_fit}
    numbers = {name: float(value) for name, value in values.items()}
    numbers["bits_per_dim"] = bits_per_dim(numbers["loss"], model.pixels)
    images = int(found.terms["images"])
    numbers["active_units"] = active_units(images, found.mean, found.mean_sq, found.variance)
    return numbers

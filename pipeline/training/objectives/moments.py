"""Moments of the codes, and what follows from them in closed form (all ranks)."""

from __future__ import annotations

import torch
from torch import Tensor

from cvae.control import CodeMoments
from cvae.model import CVAE
from pipeline.runtime.distributed import Ranks
from pipeline.training.validation import HeldOut


@torch.no_grad()
def code_spread(model: CVAE, part: HeldOut, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return mean and deviation [D] of the codes of `part`, float64 (all ranks)."""
    dtype = next(model.parameters()).dtype
    sums = torch.zeros(1 + 2 * model.z_dim, dtype=torch.float64, device=ranks.device)
    for x, y, _ in part.blocks(ranks, model.z_dim, dtype):
        q = model.encode(x, y)
        mean = q.mean.double()
        second = mean.square() + (2 * q.log_std.double()).exp()
        count = sums.new_full((1,), float(len(x)))
        sums += torch.cat((count, mean.sum(0), second.sum(0)))
    sums = ranks.reduce_sum(sums)
    mean, second = (sums[1:] / sums[0]).chunk(2)
    return mean, (second - mean.square()).sqrt()


@torch.no_grad()
def fit_control(model: CVAE, part: HeldOut, ranks: Ranks) -> None:
    """Fit the model's attribute control to the mean codes of `part` (all ranks)."""
    if model.control is None:
        return
    dtype = next(model.parameters()).dtype
    width = 1 + model.z_dim + model.n_attributes
    products = torch.zeros(width, width, dtype=torch.float64, device=ranks.device)
    for x, y, _ in part.blocks(ranks, model.z_dim, dtype):
        one = x.new_ones(len(x), 1)
        row = torch.cat((one, model.encode(x, y).mean, y), dim=1).double()
        products += row.T @ row
    products = ranks.reduce_sum(products.flatten()).view(width, width) / products.new_tensor(
        len(part.indices)
    )
    codes, labels = slice(1, 1 + model.z_dim), slice(1 + model.z_dim, width)
    moments = CodeMoments(
        products[0, codes], products[0, labels], products[codes, codes], products[codes, labels]
    )
    model.control.fit(moments)


@torch.no_grad()
def fit_anomaly(model: CVAE, part: HeldOut, ranks: Ranks) -> None:
    """Fit the model's anomaly score to the decoder's maps of the mean codes of `part` (all ranks)."""
    score = model.anomaly
    if score is None:
        return
    mean, second = (torch.zeros_like(some, dtype=torch.float64) for some in (score.mean, score.precision))
    for x, y, _ in part.blocks(ranks, model.z_dim, next(model.parameters()).dtype):
        cells = score.cells(model.middle(model.encode(x, y).mean, y)).double()
        mean += cells.sum(1)
        second += cells.transpose(1, 2) @ cells
    both = ranks.reduce_sum(torch.cat((mean.flatten(), second.flatten()))) / len(part.indices)
    score.fit(both[: mean.numel()].view_as(mean), both[mean.numel() :].view_as(second))

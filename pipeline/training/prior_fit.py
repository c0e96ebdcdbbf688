"""The objective of the stage `refine`: fit the prior to codes of the frozen encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae.losses import Losses, Sums, pack, unpack
from cvae.model import CVAE, identity
from pipeline.runtime.distributed import Ranks
from pipeline.training.validation import HeldOut

UNKNOWN = 0.5  # the value of an attribute that is hidden from the prior


class PriorFit(nn.Module):
    """Encodes images without gradient and applies the prior's own loss to the codes.

    noise [B, 1 + D + F]: one number decides whether the attributes are hidden, D are the encoder's, F
    the prior's.
    """

    def __init__(self, model: CVAE, attribute_dropout: float) -> None:
        super().__init__()
        self.model = model
        threshold = torch.tensor(attribute_dropout, dtype=torch.float64)
        # P(standard normal number < threshold) = attribute_dropout
        self.threshold = float(torch.special.ndtri(threshold))

    @property
    def noise_width(self) -> int:
        """Normal numbers for each image."""
        return 1 + self.model.z_dim + self.model.conditional_prior.fit_noise

    def sums(self, x: Tensor, y: Tensor, noise: Tensor) -> Sums:
        """Return the sum of the prior's loss over these images, which may be none."""
        if len(x) == 0:
            # A rank without images still takes part in the collectives of the backward pass.
            blank = [t.new_zeros(1, *t.shape[1:]) for t in (x, y, noise)]
            one = self.sums(*blank)
            return {name: 0 * value for name, value in one.items()}
        z_dim = self.model.z_dim
        hidden = noise[:, 0] < self.threshold
        with torch.no_grad():
            z = self.model.encode(x, y).sample(noise[:, 1 : 1 + z_dim])
        shown = torch.where(hidden[:, None], torch.full_like(y, UNKNOWN), y)
        loss = self.model.prior(shown).fit_loss(z, noise[:, 1 + z_dim :])
        return {"fit": loss.sum(), "images": loss.new_full((), float(len(x)))}

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor,
        beta: float | Tensor,
        scale: float,
        reduce_sum: Callable[[Tensor], Tensor] = identity,
    ) -> Losses:
        """Return the loss of the global batch (all ranks), per code; see `CVAE.forward`."""
        local = self.sums(x, y, noise)
        total = unpack(reduce_sum(pack(local)), local)
        share = local["fit"] * (scale / self.model.z_dim)
        return Losses(share, {"loss": total["fit"] / total["images"]})


@torch.no_grad()
def standardise(model: CVAE, part: HeldOut, ranks: Ranks) -> None:
    """Tell the prior the mean and deviation of the codes of `part` (all ranks)."""
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
    model.conditional_prior.standardise(mean, (second - mean.square()).sqrt())


@torch.no_grad()
def held_out_loss(fit: PriorFit, part: HeldOut, ranks: Ranks) -> float:
    """Return the prior's loss on the codes of `part`, per code (all ranks)."""
    dtype = next(fit.model.parameters()).dtype
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for x, y, noise in part.blocks(ranks, fit.noise_width, dtype):
        sums += pack(fit.sums(x, y, noise))
    total = ranks.reduce_sum(sums)
    return float(total[0] / total[1])

"""The base of objectives that fit one part of a model to codes of its frozen encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae.losses import Losses, Sums, pack, unpack
from cvae.model import CVAE, identity
from pipeline.runtime.distributed import Ranks
from pipeline.training.validation import HeldOut


class CodeFit(nn.Module):
    """A loss of codes. It counts per code dimension in the objective and per code in the records."""

    model: CVAE

    @property
    @abstractmethod
    def noise_width(self) -> int:
        """Normal numbers for each image."""

    @abstractmethod
    def losses(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each of at least one image [B]."""

    @abstractmethod
    def of(self, model: CVAE) -> CodeFit:
        """Return the same loss for other weights, as validation takes it."""

    def sums(self, x: Tensor, y: Tensor, noise: Tensor) -> Sums:
        """Return the sum of the loss over these images, which may be none."""
        if len(x) == 0:
            # A rank without images still takes part in the collectives of the backward pass.
            blank = [t.new_zeros(1, *t.shape[1:]) for t in (x, y, noise)]
            one = self.sums(*blank)
            return {name: 0 * value for name, value in one.items()}
        loss = self.losses(x, y, noise)
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
    def held_out_loss(self, part: HeldOut, ranks: Ranks) -> float:
        """Return the loss of the codes of `part`, per code (all ranks)."""
        dtype = next(self.model.parameters()).dtype
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for x, y, noise in part.blocks(ranks, self.noise_width, dtype):
            sums += pack(self.sums(x, y, noise))
        total = ranks.reduce_sum(sums)
        return float(total[0] / total[1])

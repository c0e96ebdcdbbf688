"""What each phase minimises: the whole model, the decoder alone (`tune`), the prior alone (`refine`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae.control import CodeMoments
from cvae.losses import Losses, Sums, pack, unpack
from cvae.model import CVAE, identity
from pipeline.errors import ConfigError
from pipeline.runtime.distributed import Ranks
from pipeline.training.phases import Phase
from pipeline.training.validation import HeldOut

UNKNOWN = 0.5  # the value of an attribute that is hidden from the prior


class DecoderFit(nn.Module):
    """The model's own objective, on codes with extra noise: the decoder learns to forgive a prior.

    A prior misses codes by a little in every direction. A decoder that only knows posterior codes
    answers with smears. Each code gets normal noise of up to `spread` [D], by a uniform share.
    noise [B, 2 D + 1]: D numbers are the encoder's, D are the extra noise, one decides its share.
    """

    def __init__(self, model: CVAE, spread: Tensor) -> None:
        super().__init__()
        self.model = model
        self.spread: Tensor
        self.register_buffer("spread", spread, persistent=False)

    @property
    def noise_width(self) -> int:
        """Normal numbers for each image."""
        return 2 * self.model.z_dim + 1

    def _shifted(self, noise: Tensor) -> Tensor:
        """Return the encoder's noise and the shift of each code [B, 2 D]."""
        own, extra, share = noise.split((self.model.z_dim, self.model.z_dim, 1), dim=1)
        shift = torch.special.ndtr(share) * self.spread.to(noise) * extra
        return torch.cat((own, shift), dim=1)

    def sums(self, x: Tensor, y: Tensor, noise: Tensor) -> Sums:
        """Sum the model's terms over these images, which may be none."""
        return self.model.sums(x, y, self._shifted(noise))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor,
        beta: float | Tensor,
        scale: float,
        reduce_sum: Callable[[Tensor], Tensor] = identity,
    ) -> Losses:
        """Return the losses of the global batch (all ranks); see `CVAE.forward`."""
        return self.model(x, y, self._shifted(noise), beta, scale, reduce_sum)


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


Objective = CVAE | DecoderFit | PriorFit


def objective_of(phase: Phase, model: CVAE, part: HeldOut, ranks: Ranks) -> Objective:
    """Return what a phase trains, with the weights frozen that it does not fit (all ranks).

    `part`: training images whose codes tell how wide the codes are spread.
    """
    if phase.fitted:
        model.requires_grad_(False)
    for name in phase.fitted:
        getattr(model, name).requires_grad_(True)
    if phase.code_noise:
        _, deviation = code_spread(model, part, ranks)
        return DecoderFit(model, phase.code_noise * deviation)
    if phase.name != "refine":
        return model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"key 'refine.prior.name': the prior {phase.config.model.prior.name!r} has nothing to fit;"
            " use gaussian, flow or flow_matching"
        )
    return PriorFit(model, phase.attribute_dropout)


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
def held_out_loss(fit: PriorFit, part: HeldOut, ranks: Ranks) -> float:
    """Return the prior's loss on the codes of `part`, per code (all ranks)."""
    dtype = next(fit.model.parameters()).dtype
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for x, y, noise in part.blocks(ranks, fit.noise_width, dtype):
        sums += pack(fit.sums(x, y, noise))
    total = ranks.reduce_sum(sums)
    return float(total[0] / total[1])

"""What `steer` minimises: the error of the network that predicts what the guides see in decoded codes."""

from __future__ import annotations

import torch
from torch import Tensor

from cvae.model import CVAE
from pipeline.training.classify.guides import Guides
from pipeline.training.objectives.code import CodeFit

STRENGTHS = (1.0, 4.0)  # of the edits that the network learns from
SHIFT = 0.5  # largest shift of a code, in deviations of the codes


class SteerFit(CodeFit):
    """Decodes codes as they are, edited, or shifted; the model's reader learns the guides' scores.

    A third of the codes is left alone. In a third, one attribute is edited in closed form. To the rest
    normal noise is added. noise [B, D + 4]: the noise, the kind, the attribute, the strength, the shift.
    """

    def __init__(self, model: CVAE, guides: Guides) -> None:
        super().__init__()
        self.model = model
        self.guides = guides

    @property
    def noise_width(self) -> int:
        """Normal numbers for each image."""
        return self.model.z_dim + 4

    def losses(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return the squared error of each image [B], summed over attributes."""
        control = self.model.control
        assert control is not None
        with torch.no_grad():
            z, shown = self._varied(self.model.encode(x, y).mean, y, noise)
            seen = self.guides(self.model.decode(z, shown))
        with torch.autocast(z.device.type, enabled=False):
            return (control.read(z) - seen.to(z)).square().sum(1)

    def _varied(self, z: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [B, D] to learn from, and the attributes [B, A] to decode them with."""
        control = self.model.control
        assert control is not None
        normal, rest = noise[:, : self.model.z_dim], noise[:, self.model.z_dim :]
        kind, which, strength, width = torch.special.ndtr(rest).split(1, dim=1)

        n = self.model.n_attributes
        chosen = (which * n).long().clamp_max(n - 1)
        after = torch.scatter(y, 1, chosen, 1 - y.gather(1, chosen))
        low, high = STRENGTHS
        edited = control.edit_linearly(z, y, after, low + (high - low) * strength)
        shifted = z + SHIFT * width * normal @ control.factor.T
        plain, edits = kind < 1 / 3, kind > 2 / 3
        varied = torch.where(plain, z, torch.where(edits, edited, shifted))
        return varied, torch.where(edits, after, y)

    def of(self, model: CVAE) -> SteerFit:
        """Return the loss for other weights."""
        return SteerFit(model, self.guides)

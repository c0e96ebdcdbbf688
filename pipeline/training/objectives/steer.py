"""What `steer` minimises: the error of the network that predicts what the guides see in decoded codes."""

from __future__ import annotations

import torch
from torch import Tensor

from cvae.model import CVAE
from cvae.nets.layers import full_precision
from pipeline.training.classify.guides import Guides
from pipeline.training.objectives.code import CodeFit

LINEAR = (1.0, 4.0)  # strengths of the edits in closed form that the network learns from
OWN = (0.5, 3.0)  # strengths of its own edits that it learns from
SHIFT = 0.5  # largest shift of a code, in deviations of the codes


class SteerFit(CodeFit):
    """Decodes codes as they are, edited, or shifted; the model's reader learns the guides' scores.

    A quarter of the codes is left alone, and to a quarter normal noise is added. In a sixth one attribute is
    edited in closed form, in a third as the reader itself edits now: there its errors would do harm.
    noise [B, D + 4]: the noise, the kind, the attribute, the strength, the shift.
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
        shifted = z + SHIFT * width * normal @ control.factor.T
        linear = control.edit_linearly(z, y, after, _between(LINEAR, strength))
        with torch.autocast(z.device.type, enabled=False):
            own = control.edit(full_precision(z), y, after, _between(OWN, strength)).to(z)
        edits = torch.where(kind > 2 / 3, own, linear)
        plain = torch.where(kind < 1 / 4, z, shifted)
        edited = kind > 1 / 2
        return torch.where(edited, edits, plain), torch.where(edited, after, y)

    def of(self, model: CVAE) -> SteerFit:
        """Return the loss for other weights."""
        return SteerFit(model, self.guides)


def _between(bounds: tuple[float, float], share: Tensor) -> Tensor:
    low, high = bounds
    return low + (high - low) * share

"""What `refine` minimises: the prior alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cvae.attributes import UNKNOWN
from cvae.model import CVAE
from pipeline.training.objectives.code import CodeFit


class PriorFit(CodeFit):
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

    def losses(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return the prior's loss of the code of each image [B]."""
        z_dim = self.model.z_dim
        hidden = noise[:, 0] < self.threshold
        with torch.no_grad():
            z = self.model.encode(x, y).sample(noise[:, 1 : 1 + z_dim])
        shown = torch.where(hidden[:, None], torch.full_like(y, UNKNOWN), y)
        return self.model.prior(shown).fit_loss(z, noise[:, 1 + z_dim :])

    def of(self, model: CVAE) -> PriorFit:
        """Return the loss for other weights; validation hides no attribute."""
        return PriorFit(model, 0.0)

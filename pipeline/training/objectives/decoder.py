"""What `tune` minimises: the decoder alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae.losses import Losses, Sums
from cvae.model import CVAE, identity


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

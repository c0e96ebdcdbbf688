"""Samples of the same noise and requests at every validation, which show how a model learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cvae.model import CVAE
from pipeline.data.grids import grid, save_png
from pipeline.data.pixels import to_uint8
from pipeline.runtime.keyed import keyed_normal
from pipeline.runtime.split import spread
from pipeline.training.validation import HeldOut

COLUMNS, SAMPLES = 8, 16


@torch.no_grad()
def draw_fixed_noise(model: CVAE, held_out: HeldOut, file: Path) -> None:
    """Write samples for the attributes of SAMPLES held-out images as PNG (rank 0 only).

    The noise is keyed, so no random generator moves.
    """
    parameter = next(model.parameters())
    total = len(held_out.indices)
    indices = spread(min(SAMPLES, total), total)
    labels = held_out.shards.attributes()[held_out.indices[indices]][:, held_out.columns]
    y = torch.from_numpy(labels).to(parameter.device, parameter.dtype)
    noise = keyed_normal(0, "fixed noise", np.arange(len(indices)), (model.z_dim,))
    z = model.prior(y).sample(noise.to(parameter.device, parameter.dtype))
    images = to_uint8(model.decode(z, y)).cpu().numpy()
    save_png(grid(images, COLUMNS), file)

"""The same noise and the same requests at every validation: how samples grow while a model is trained."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from cvae.model import CVAE
from pipeline.data.pixels import to_uint8
from pipeline.reporting.grids import grid
from pipeline.rundir.files import write_bytes
from pipeline.runtime.keyed import keyed_normal
from pipeline.runtime.split import spread
from pipeline.training.validation import HeldOut

COLUMNS, SAMPLES = 8, 16


@torch.no_grad()
def draw_fixed_noise(model: CVAE, held_out: HeldOut, file: Path) -> None:
    """Write samples for the attributes of SAMPLES held-out images as PNG (rank 0 alone; noise is keyed, no generator moves)."""
    parameter = next(model.parameters())
    indices = spread(min(SAMPLES, len(held_out.indices)), len(held_out.indices))
    labels = held_out.shards.attributes()[held_out.indices[indices]][:, held_out.columns]
    y = torch.from_numpy(labels).to(parameter.device, parameter.dtype)
    noise = keyed_normal(0, "fixed noise", np.arange(len(indices)), (model.z_dim,)).to(
        parameter.device, parameter.dtype
    )
    picture = io.BytesIO()
    grid(to_uint8(model.decode(model.prior(y).sample(noise), y)).cpu().numpy(), COLUMNS).save(picture, "png")
    write_bytes(file, picture.getvalue())

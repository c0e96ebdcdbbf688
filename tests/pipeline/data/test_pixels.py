"""Conversion between levels 0 .. 255 and the range [-1, 1]."""

from __future__ import annotations

import torch

from pipeline.data.loader import to_float
from pipeline.data.pixels import to_uint8


def test_uint8_conversion_is_the_inverse_of_to_float_and_rounds_and_clamps() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    x = torch.tensor([-1.4, -1.0, 0.0, 0.0 + 0.6 / 127.5, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]  # 127.5 rounds to even

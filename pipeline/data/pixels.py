"""Pixels -> centred crop -> antialiased resize, and back to the levels that are stored."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ShardConfig
from pipeline.data.sources.base import ImageError


def crop_centre(image: np.ndarray, crop: int) -> np.ndarray:
    """Return the centred square [crop, crop, 3] of an image [H, W, 3] as a view; offsets round down.

    A crop of 0 is the largest square. Raises ImageError if the image is smaller than the square.
    """
    height, width = image.shape[:2]
    crop = crop or min(height, width)
    if min(height, width) < crop:
        raise ImageError(f"is {width}x{height} pixels, smaller than shard.crop={crop}")
    top = (height - crop) // 2
    left = (width - crop) // 2
    return image[top : top + crop, left : left + crop]


def cut(image: np.ndarray, config: ShardConfig) -> np.ndarray:
    """Return the square of an image [H, W, 3] that shards are made of.

    With a crop it has that side. Without, the largest square is resized to `size` here, since sides differ.
    Raises ImageError if the image is too small.
    """
    square = crop_centre(image, config.crop)
    if config.crop:
        return square
    if len(square) < config.size and not config.allow_upsampling:
        height, width = image.shape[:2]
        raise ImageError(
            f"is {width}x{height} pixels, smaller than shard.size={config.size}; "
            "lower the size, or set shard.allow_upsampling=true"
        )
    return resize(np.ascontiguousarray(square)[None], config.size)[0]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize images bilinearly with antialiasing: uint8 [n, H, H, 3] -> [n, size, size, 3].

    The result differs from PIL's BILINEAR by at most one grey level.
    """
    if images.shape[1] == size:
        return images
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    resized = F.interpolate(nchw, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def to_uint8(x: Tensor) -> Tensor:
    """Round images [B, 3, S, S] in [-1, 1] to the nearest of 256 levels [B, S, S, 3].

    This is the inverse of `loader.to_float`.
    """
    return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

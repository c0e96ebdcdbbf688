"""JPEG -> centred crop -> antialiased resize."""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, HEIGHT = 178, 218  # of an aligned CelebA image


def decode(jpeg: bytes) -> np.ndarray:
    """Pixels of one aligned CelebA image, uint8 [218, 178, 3]; ValueError says why `jpeg` is not one.

    Strict decoding refuses truncated and corrupt data that libjpeg would fill up with grey.
    """
    if not jpeg.startswith(b"\xff\xd8"):
        raise ValueError("is not a JPEG" if jpeg else "is empty")
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        if (width, height) != (WIDTH, HEIGHT):
            raise ValueError(f"is {width}x{height} pixels, expected {WIDTH}x{HEIGHT}")
        return simplejpeg.decode_jpeg(jpeg, "RGB")
    except ValueError as error:
        if str(error).startswith("is "):
            raise
        raise ValueError(f"is a damaged or truncated JPEG ({error})") from None


def crop_centre(image: np.ndarray, crop: int) -> np.ndarray:
    """The centred square [crop, crop, 3] of an image [H, W, 3] (a view); offsets are rounded down."""
    top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
    return image[top : top + crop, left : left + crop]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize with antialiasing (PIL's BILINEAR within one grey level): uint8 [n, H, H, 3] -> [n, size, size, 3]."""
    if images.shape[1] == size:
        return images
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    resized = F.interpolate(nchw, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def to_uint8(x: Tensor) -> Tensor:
    """Images [B, 3, S, S] in [-1, 1] -> [B, S, S, 3] as they would be stored: the nearest of 256 levels; the inverse of `to_float`."""
    return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

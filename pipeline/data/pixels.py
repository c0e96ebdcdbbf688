"""Pixels -> centred crop -> antialiased resize -> levels that are stored, with or without the background.

What is no person becomes green if `shard.background=green`. The foreground is found as GrabCut does it
(Rother et al. 2004), for many images at once and without landmarks: a prior of where the head is, colour
histograms of foreground and background in turn, and neighbours of like colour that stay together.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ShardConfig
from pipeline.data.sources.base import ImageError

GREEN = 1  # the channel of the background's colour (0, 255, 0)
BINS = 8  # of each channel of a colour histogram
ROUNDS = 4  # new histograms
SETTLINGS = 6  # exchanges with the neighbours in each round
TIE = 2.0  # how much a neighbour of the same colour counts, logits
MOST = 4.0  # how much colour counts, logits


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
    """Resize images bilinearly with antialiasing: uint8 [n, H, W, 3] -> [n, size, size, 3].

    The result differs from PIL's BILINEAR by at most one grey level.
    """
    if images.shape[1:3] == (size, size):
        return images
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    resized = F.interpolate(nchw, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def to_uint8(x: Tensor) -> Tensor:
    """Round images [B, 3, S, S] in [-1, 1] to the nearest of 256 levels [B, S, S, 3].

    This is the inverse of `loader.to_float`.
    """
    return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def green_behind(images: np.ndarray) -> np.ndarray:
    """Replace the background of centred heads by green: uint8 [n, S, S, 3] -> [n, S, S, 3].

    Green is also taken from the foreground where it outshines red and blue, so that `put_behind` can
    tell the two apart. The result for one image does not depend on the others.
    """
    x = torch.from_numpy(images).float()
    share = foreground(images)[..., None]
    others = x[..., [0, 2]].amax(3)
    x[..., GREEN] = torch.minimum(x[..., GREEN], others)
    x = share * x
    x[..., GREEN] += 255 * (1 - share[..., 0])
    return x.round().to(torch.uint8).numpy()


def put_behind(images: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Put uint8 [S, S, 3] behind images uint8 [n, S, S, 3] with a green background.

    The share of the background is what green has more than red and blue. Other images stay as they are.
    """
    x = images.astype(np.float32)
    share = np.clip(x[..., GREEN] - np.maximum(x[..., 0], x[..., 2]), 0, None)
    x[..., GREEN] -= share
    return np.rint(x + share[..., None] / 255 * background).clip(0, 255).astype(np.uint8)


def foreground(images: np.ndarray) -> Tensor:
    """Return the share of the foreground in each pixel, uint8 [n, S, S, 3] -> float32 [n, S, S]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    levels = (x * (BINS - 1e-3)).long()
    bins = (levels[:, 0] * BINS**2 + levels[:, 1] * BINS + levels[:, 2]).flatten(1)
    place = _head_logits(x.shape[-1])
    right = _likeness(x[..., :, 1:] - x[..., :, :-1])
    down = _likeness(x[..., 1:, :] - x[..., :-1, :])
    share = torch.sigmoid(place).expand(len(x), -1, -1)
    for _ in range(ROUNDS):
        inside, outside = _histogram(bins, share), _histogram(bins, 1 - share)
        colour = (inside / outside).log().gather(1, bins).view_as(share).clamp(-MOST, MOST)
        share = torch.sigmoid(place + colour)
        for _ in range(SETTLINGS):
            share = torch.sigmoid(place + colour + TIE * _from_neighbours(2 * share - 1, right, down))
    whole = F.avg_pool2d(share[:, None], 3, 1, 1, count_include_pad=False)[:, 0]  # no lines of one pixel
    return (2 * whole - 0.5).clamp(0, 1)


def _head_logits(size: int) -> Tensor:
    """Where a centred head is expected, logits [S, S]: ellipses of head, face and shoulders."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    head = (x / 0.72) ** 2 + ((y - 0.05) / 0.95) ** 2
    shoulders = x**2 + ((y - 1.35) / 0.6) ** 2
    face = (x / 0.5) ** 2 + ((y - 0.1) / 0.65) ** 2
    likely = (3 * (1 - torch.minimum(head, shoulders))).clamp(-4, 2)
    return likely + (8 * (1.1 - face)).clamp(0, 8)


def _likeness(difference: Tensor) -> Tensor:
    """1 for neighbours of one colour, less the more they differ: [n, 3, H, W] -> [n, H, W]."""
    squares = difference.square().sum(1)
    usual = 2 * squares.mean((1, 2), keepdim=True) + 1e-6
    return (-squares / usual).exp()


def _histogram(bins: Tensor, weights: Tensor) -> Tensor:
    """Share of each colour [n, BINS^3] among pixels with these weights, smoothed along the channels."""
    weights = weights.flatten(1)
    counts = weights.new_zeros(len(bins), BINS**3).scatter_add_(1, bins, weights)
    counts = counts.view(-1, BINS, BINS, BINS)
    for axis in (1, 2, 3):
        smooth = 6 * counts
        for step, weight in ((1, 4), (2, 1)):
            low, high = counts.narrow(axis, 0, BINS - step), counts.narrow(axis, step, BINS - step)
            smooth.narrow(axis, step, BINS - step).add_(low, alpha=weight)
            smooth.narrow(axis, 0, BINS - step).add_(high, alpha=weight)
        counts = smooth / 16
    return counts.flatten(1) / weights.sum(1, keepdim=True) + 1e-6


def _from_neighbours(sign: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Sum of the four neighbours' signs, weighted by likeness, [n, S, S]."""
    total = torch.zeros_like(sign)
    total[:, :, :-1] += right * sign[:, :, 1:]
    total[:, :, 1:] += right * sign[:, :, :-1]
    total[:, :-1] += down * sign[:, 1:]
    total[:, 1:] += down * sign[:, :-1]
    return total

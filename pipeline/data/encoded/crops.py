"""Random resized crops: a box within the centred square of each image."""

from __future__ import annotations

import numpy as np

from pipeline.runtime.keyed import generator

RATIOS = (3 / 4, 4 / 3)  # least and largest width / height of a box, as in torchvision's RandomResizedCrop


def random_boxes(seed: int, positions: range, smallest: float) -> np.ndarray:
    """Return a box (down, right, height, width) for each position of the stream, float64 [b, 4].

    Height and width are shares of the square's side. `down` and `right` are shares of the room beside
    the box, so a box fits into a square of any side; see `cut_box`.
    A box keeps a share of the square's area that is uniform in [smallest, 1]. The logarithm of its
    width / height is uniform too. A box that is longer than the square is cut to it.
    """
    draws = np.array([generator(seed, "crop", position).random(4) for position in positions])
    share, shape, down, right = draws.reshape(-1, 4).T
    area = smallest + (1 - smallest) * share
    low, high = np.log(RATIOS)
    ratio = np.exp(low + (high - low) * shape)
    height = np.minimum(np.sqrt(area / ratio), 1)
    width = np.minimum(np.sqrt(area * ratio), 1)
    return np.stack((down, right, height, width), 1)


def cut_box(square: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return one of `random_boxes` of a square [H, H, 3] as a view [height, width, 3] in whole pixels."""
    side = len(square)
    down, right, *extent = box
    height, width = np.clip(np.rint(np.array(extent) * side), 1, side).astype(int)
    top = int(down * (side - height + 1))
    left = int(right * (side - width + 1))
    return square[top : top + height, left : left + width]

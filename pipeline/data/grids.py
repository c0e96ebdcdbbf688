"""Rows and columns of images as one picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.rundir.files import write_bytes
from pipeline.runtime.split import ceil_div

GAP = 2  # pixels
LEGIBLE = 128  # pixels: a smaller image is hard to judge on a screen


def enlarged(images: np.ndarray) -> np.ndarray:
    """Repeat the pixels of uint8 images [N, S, S, 3] until they have at least LEGIBLE pixels a side."""
    factor = ceil_div(LEGIBLE, images.shape[1])
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """Put uint8 images [N, S, S, 3] row by row on white."""
    size = images.shape[1] + GAP
    rows = ceil_div(len(images), columns)
    canvas = np.full((rows * size + GAP, columns * size + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top = i // columns * size + GAP
        left = i % columns * size + GAP
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def save_png(picture: Image.Image, file: Path) -> None:
    """Write a picture as PNG, whole or not at all. Raises StorageError."""
    content = io.BytesIO()
    picture.save(content, "png")
    write_bytes(file, content.getvalue())

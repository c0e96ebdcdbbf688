"""Rows and columns of images as one picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from pipeline.runtime.split import ceil_div

GAP = 2  # pixels
ROW_LABEL = 240  # pixels left of a labelled row


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """uint8 images [N, S, S, 3] row by row on white."""
    size = images.shape[1] + GAP
    rows = ceil_div(len(images), columns)
    canvas = np.full((rows * size + GAP, columns * size + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * size + GAP, i % columns * size + GAP
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def labelled(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """One row of images [N, S, S, 3] for each label."""
    strips = [grid(images, len(images)) for _, images in rows]
    canvas = Image.new(
        "RGB", (ROW_LABEL + max(s.width for s in strips), sum(s.height for s in strips)), "white"
    )
    top = 0
    for (label, _), strip in zip(rows, strips, strict=True):
        canvas.paste(strip, (ROW_LABEL, top))
        ImageDraw.Draw(canvas).text((4, top + strip.height // 2 - 6), label, fill="black")
        top += strip.height
    return canvas

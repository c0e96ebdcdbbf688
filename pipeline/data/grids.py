"""Rows and columns of images as one picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.rundir.files import write_bytes
from pipeline.runtime.split import ceil_div

GAP = 2  # pixels
ROW_LABEL = 240  # pixels left of a labelled row


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


def labelled(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Put a label left of each row of images [N, S, S, 3]."""
    strips = [grid(images, len(images)) for _, images in rows]
    width = ROW_LABEL + max(strip.width for strip in strips)
    height = sum(strip.height for strip in strips)
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    top = 0
    for (label, _), strip in zip(rows, strips, strict=True):
        canvas.paste(strip, (ROW_LABEL, top))
        pen.text((4, top + strip.height // 2 - 6), label, fill="black")
        top += strip.height
    return canvas


def save_png(picture: Image.Image, file: Path) -> None:
    """Write a picture as PNG, whole or not at all. Raises StorageError."""
    content = io.BytesIO()
    picture.save(content, "png")
    write_bytes(file, content.getvalue())

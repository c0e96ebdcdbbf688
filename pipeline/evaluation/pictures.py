"""Grids of images as PNG files; rank 0 alone draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline.evaluation.blocks import to_uint8
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.rare import requests

COLUMNS, ROWS, GAP = 8, 8, 2  # images, images, pixels
ROW_LABEL = 200  # pixels left of a labelled row
SHOWN_PAIR = ("Heavy_Makeup", "Male")  # fig. 5 of arXiv 2511.08946


def grid(images: np.ndarray, columns: int = COLUMNS) -> Image.Image:
    """uint8 images [N, S, S, 3] row by row on white."""
    size = images.shape[1] + GAP
    rows = -(-len(images) // columns)
    canvas = np.full((rows * size + GAP, columns * size + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * size + GAP, i % columns * size + GAP
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def labelled(rows: dict[str, np.ndarray]) -> Image.Image:
    """One row of images [N, S, S, 3] for each label."""
    strips = [grid(images, len(images)) for images in rows.values()]
    canvas = Image.new("RGB", (ROW_LABEL + max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for label, strip in zip(rows, strips, strict=True):
        canvas.paste(strip, (ROW_LABEL, top))
        ImageDraw.Draw(canvas).text((4, top + strip.height // 2 - 6), label, fill="black")
        top += strip.height
    return canvas


@torch.no_grad()
def draw(evidence: Evidence, folder: Path) -> None:
    """Write reconstructions.png (rows: real, reconstructed), samples.png, rare.png and the paper's pair to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    first = np.arange(min(evidence.n, COLUMNS * ROWS))
    half = first[: COLUMNS * ROWS // 2]
    pairs = np.stack([_levels(x) for x in evidence.reconstruct(half)[:2]])  # [2, n, S, S, 3]
    strips = [pairs[:, i : i + COLUMNS] for i in range(0, len(half), COLUMNS)]
    padded = [np.pad(s, ((0, 0), (0, COLUMNS - s.shape[1]), (0, 0), (0, 0), (0, 0)), constant_values=255) for s in strips]
    grid(np.concatenate([row for strip in padded for row in strip])).save(folder / "reconstructions.png")
    grid(_levels(evidence.draw("samples", first, evidence.requested[first]))).save(folder / "samples.png")
    rare = {" + ".join(pair.attributes): _pair(evidence, pair.attributes, COLUMNS) for pair, _ in evidence.rare}
    if rare:
        labelled(rare).save(folder / "rare.png")
    if set(SHOWN_PAIR) <= set(evidence.info.attributes):
        grid(_pair(evidence, SHOWN_PAIR, COLUMNS * ROWS // 2)).save(folder / "male_heavy_makeup.png")


def _levels(x: torch.Tensor) -> np.ndarray:
    return to_uint8(x).cpu().numpy()


def _pair(evidence: Evidence, attributes: tuple[str, str], n: int) -> np.ndarray:
    """`n` samples [n, S, S, 3] that are asked for both attributes."""
    settings = evidence.settings
    wanted = requests(evidence.labels(settings.split), evidence.info.attributes, attributes, n, settings.seed)
    return _levels(evidence.draw("rare/" + "+".join(attributes), np.arange(n), wanted))

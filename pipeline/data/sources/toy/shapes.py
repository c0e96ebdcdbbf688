"""Toy shapes: a drawn data set that is not faces, as a folder of PNGs of several modes and one CSV."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from pipeline.data.sources.facts import FACTS
from pipeline.rundir.files import write_text

SHAPES = ("Circle", "Square", "Triangle")
ATTRIBUTES = (*SHAPES, "Filled", "Large")
MODES = ("RGB", "RGBA", "P", "L")  # in turn
TABLE = "labels.csv"
_FINE = 3  # shapes are drawn larger by this, then reduced: smooth edges


def make_toy_shapes(folder: Path, n: int, seed: int = 0) -> None:
    """Draw `n` images into folder/pictures, and write labels.csv (last) and dataset.yaml beside them.

    An image shows one of three shapes, filled or not, large or not. Its sides have 40 to 64 pixels.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(n):
        random = np.random.default_rng([seed, number])
        shape = int(random.integers(len(SHAPES)))
        filled, large = random.integers(0, 2, 2).tolist()
        image = _draw(SHAPES[shape], bool(filled), bool(large), random)
        name = f"shape_{number:05d}.png"
        _in_mode(image, MODES[number % len(MODES)]).save(pictures / name)
        rows.append([name, *(int(shape == index) for index in range(len(SHAPES))), filled, large])
    facts = {"name": "toy shapes", "exclusive": [list(SHAPES)], "contrast": ["Filled", "Large"]}
    write_text(folder / FACTS, yaml.safe_dump(facts, sort_keys=False))
    with (folder / TABLE).open("w", newline="") as file:
        csv.writer(file).writerows([["image", *ATTRIBUTES], *rows])


def _draw(shape: str, filled: bool, large: bool, random: np.random.Generator) -> Image.Image:
    """Return one drawing, RGBA; the ground is transparent."""
    width, height = random.integers(40, 65, 2).tolist()
    colour = (*random.integers(0, 170, 3).tolist(), 255)
    radius = min(width, height) * (0.38 if large else 0.2) * _FINE
    x, y = (side * _FINE / 2 + random.uniform(-4, 4) * _FINE for side in (width, height))
    canvas = Image.new("RGBA", (width * _FINE, height * _FINE), (255, 255, 255, 0))
    pen = ImageDraw.Draw(canvas)
    fill = colour if filled else None
    if shape == "Circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill, colour, 2 * _FINE)
    else:
        corners = 4 if shape == "Square" else 3
        pen.regular_polygon((x, y, radius), corners, 0, fill, colour, 2 * _FINE)
    return canvas.resize((width, height), Image.Resampling.BOX)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "RGBA":
        return image
    ground = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ground.quantize(64) if mode == "P" else ground.convert(mode)

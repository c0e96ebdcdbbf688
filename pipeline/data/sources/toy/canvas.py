"""A small canvas for drawn faces: smooth shapes in face coordinates, supersampled twice."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 178, 218  # of CelebA's aligned images, pixels
SCALE = 2  # supersampling
SOFT = 4  # masks of blurred shapes are drawn this much smaller

Colour = tuple[int, int, int]


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Mix `a` (share 0) and `b` (share 1)."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def darker(colour: Colour, share: float) -> Colour:
    """Mix a colour with a warm black."""
    return mix(colour, (24, 8, 6), share)


def lighter(colour: Colour, share: float) -> Colour:
    """Mix a colour with a warm white."""
    return mix(colour, (255, 246, 234), share)


def points(*xy: float) -> np.ndarray:
    """Return x0, y0, x1, y1, ... as float [N, 2]."""
    return np.array(xy, dtype=float).reshape(-1, 2)


_T = np.linspace(0, 1, 6, endpoint=False)[:, None]
_CATMULL_ROM = (
    np.hstack(
        [_T * (-1 + _T * (2 - _T)), 2 + _T**2 * (3 * _T - 5), _T * (1 + _T * (4 - 3 * _T)), _T**2 * (_T - 1)]
    )
    / 2
)


def curve(*xy: float) -> np.ndarray:
    """Return a smooth open curve through the points x0, y0, x1, y1, ..., [6 (N - 1) + 1, 2]."""
    return smooth(points(*xy))


def smooth(knots: np.ndarray) -> np.ndarray:
    """Return a smooth open curve (Catmull-Rom) through `knots` [N, 2], [6 (N - 1) + 1, 2]."""
    padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    windows = np.stack([padded[i : i + len(knots) - 1] for i in range(4)], axis=1)  # [N - 1, 4, 2]
    return np.concatenate([(_CATMULL_ROM @ windows).reshape(-1, 2), knots[-1:]])


_ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """Return the outline [28, 2] of an axis-parallel ellipse."""
    return _CIRCLE * (rx, ry) + (x, y)


def symmetric(right: np.ndarray) -> np.ndarray:
    """Close an outline, given its right half from top to bottom."""
    return np.concatenate([right, right[::-1] * (-1, 1)])


class Canvas:
    """Draws in face coordinates.

    One unit is about a pixel of the final image, (0, 0) lies between the eyes, and y points down.
    """

    def __init__(self, image: Image.Image, x: float, y: float, degrees: float, size: float) -> None:
        """Draw on `image` (SCALE times the final size) with the face at pixel (x, y) of the final image."""
        self.image = image
        self.draw = ImageDraw.Draw(image)
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.matrix = SCALE * size * np.array([[cos, sin], [-sin, cos]])
        self.centre = (SCALE * x, SCALE * y)
        self.unit = SCALE * size

    def fill(self, outline: np.ndarray, colour: Colour, alpha: float = 1.0, blur: float = 0.0) -> None:
        """Fill a closed outline [N, 2]; `blur` is the standard deviation of its soft edge."""
        placed = outline @ self.matrix + self.centre
        if alpha == 1.0 and blur == 0.0:
            self.draw.polygon(placed.ravel().tolist(), fill=colour)
            return
        small, radius = SOFT if blur else 1, blur * self.unit
        low = np.floor((placed.min(axis=0) - 2.5 * radius) / small).astype(int)
        high = np.ceil((placed.max(axis=0) + 2.5 * radius) / small).astype(int) + 1
        low, high = np.maximum(low, -8), np.minimum(high, np.array(self.image.size) // small + 8)
        if (high <= low).any():
            return  # outside the image
        mask = Image.new("L", tuple((high - low).tolist()))
        ImageDraw.Draw(mask).polygon((placed / small - low).ravel().tolist(), fill=round(255 * alpha))
        if blur:
            full = (mask.width * small, mask.height * small)
            mask = mask.filter(ImageFilter.GaussianBlur(radius / small)).resize(
                full, Image.Resampling.BILINEAR
            )
        self.image.paste(colour, tuple((low * small).tolist()), mask)

    def line(self, path: np.ndarray, colour: Colour, width: float) -> None:
        """Draw an open path [N, 2]."""
        placed = path @ self.matrix + self.centre
        self.draw.line(
            placed.ravel().tolist(), fill=colour, width=max(1, round(width * self.unit)), joint="curve"
        )

    def dots(self, where: np.ndarray, colour: Colour, radius: float) -> None:
        """Draw small discs at [N, 2]."""
        reach = radius * self.unit
        for x, y in (where @ self.matrix + self.centre).tolist():
            self.draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)

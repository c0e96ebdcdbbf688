"""A photo as the model sees it: the square that training images keep, at the model's size."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cvae.io import Card
from pipeline.data.pixels import crop_centre, resize
from pipeline.data.sources.base import ImageError
from pipeline.data.sources.celeba_names import HEIGHT, WIDTH
from pipeline.data.sources.decode import decode
from pipeline.errors import ConfigError, DataError

# The middle of each eye in CelebA's aligned images of 178x218 pixels; the toy faces have them there too.
EYES = ((69.5, 111.0), (108.0, 111.0))
NEAREST_EYES = 4.0  # pixels of the photo; nearer points are a slip of the hand


class Eyes(NamedTuple):
    """The middle of both eyes in a photo, pixels from its left upper corner; the first is the left one."""

    x1: float
    y1: float
    x2: float
    y2: float


def parse_eyes(text: str) -> Eyes | None:
    """Read "X1,Y1,X2,Y2" in any order of the eyes; "" gives None. Raises ConfigError."""
    if not text:
        return None
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--eyes {text!r}: expected the middle of both eyes in pixels: X1,Y1,X2,Y2"
        ) from None
    return Eyes(x1, y1, x2, y2) if x1 <= x2 else Eyes(x2, y2, x1, y1)


def read_photo(file: Path, card: Card, crop: int = 0, eyes: Eyes | None = None) -> np.ndarray:
    """Return a photo as the model sees it, uint8 [1, S, S, 3]. Raises DataError; see `fit`."""
    try:
        return fit(decode(file.read_bytes()), card, crop, eyes)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except ImageError as error:
        raise DataError(f"{file}: {error}") from None


def fit(photo: np.ndarray, card: Card, crop: int = 0, eyes: Eyes | None = None) -> np.ndarray:
    """Cut and resize pixels [H, W, 3] to uint8 [1, S, S, 3]. Raises ImageError.

    With `eyes` the photo is turned, scaled and shifted until they lie where training images have them.
    Otherwise the centre is cut out; `crop` is its side in pixels, and `crop_side` explains 0.
    """
    if not 0 <= crop <= min(photo.shape[:2]):
        height, width = photo.shape[:2]
        raise ImageError(f"is {width}x{height} pixels; crop: got {crop}, expected 0 to {min(height, width)}")
    if eyes is None:
        square = crop_centre(photo, crop or crop_side(photo.shape[0], photo.shape[1], card))
    else:
        square = _aligned(photo, card, eyes)
    return resize(np.ascontiguousarray(square)[None], card.size)


def crop_side(height: int, width: int, card: Card) -> int:
    """Return the side of the square to cut, pixels.

    It is the training images' share of the shorter side. An image that already has the model's size
    is not cut.
    """
    shorter = min(height, width)
    if height == width == card.size or card.native_size is None:
        return shorter
    return max(1, round(shorter * card.crop / min(card.native_size)))


def _aligned(photo: np.ndarray, card: Card, eyes: Eyes) -> np.ndarray:
    """Return the square around a face whose eyes are given, at the photo's own resolution."""
    if card.native_size != (HEIGHT, WIDTH):
        raise ImageError(
            "cannot be aligned: this model's images are not aligned as CelebA's; leave out the eyes"
        )
    height, width = photo.shape[:2]
    inside = 0 <= eyes.x1 < width and 0 <= eyes.x2 < width and 0 <= eyes.y1 < height and 0 <= eyes.y2 < height
    if not inside or np.hypot(eyes.x2 - eyes.x1, eyes.y2 - eyes.y1) < NEAREST_EYES:
        raise ImageError(f"has {width}x{height} pixels; give two different points in it as the eyes")
    # Complex numbers turn and scale: a point p of a training image lies at start + turn * p in the photo.
    (left_x, left_y), (right_x, right_y) = EYES
    left, right = complex(left_x, left_y), complex(right_x, right_y)
    turn = (complex(eyes.x2, eyes.y2) - complex(eyes.x1, eyes.y1)) / (right - left)
    corner = complex((WIDTH - card.crop) // 2, (HEIGHT - card.crop) // 2)
    start = complex(eyes.x1, eyes.y1) + turn * (corner - left)
    side = max(card.size, round(card.crop * abs(turn)))
    step = turn * card.crop / side  # of one pixel of the square, in pixels of the photo
    matrix = (step.real, -step.imag, start.real, step.imag, step.real, start.imag)
    return _transformed(photo, side, matrix)


def _transformed(photo: np.ndarray, side: int, matrix: tuple[float, ...]) -> np.ndarray:
    """Sample a square from a photo; what lies outside of it repeats its edge, as in CelebA."""
    a, b, c, d, e, f = matrix
    ends = np.array([[0, 0], [side, 0], [0, side], [side, side]]) @ np.array([[a, d], [b, e]]) + (c, f)
    height, width = photo.shape[:2]
    beyond = np.max([-ends.min(), ends[:, 0].max() - width, ends[:, 1].max() - height, 0])
    margin = min(int(np.ceil(beyond)) + 1, 2 * max(height, width))
    padded = np.pad(photo, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    shifted = (a, b, c + margin, d, e, f + margin)
    image = Image.fromarray(padded)
    square = image.transform((side, side), Image.Transform.AFFINE, shifted, Image.Resampling.BICUBIC)
    return np.array(square)

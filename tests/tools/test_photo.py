"""A photo is aligned by its eyes as the training images are, or its centre is cut out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cvae.config import ModelConfig
from cvae.io import Card
from pipeline.data.pixels import crop_centre, resize
from pipeline.data.sources.base import ImageError
from pipeline.errors import ConfigError
from tools.parts.photo import EYES, Eyes, fit, parse_eyes

CARD = Card(ModelConfig(), 64, 148, (218, 178), ["Male"], [], torch.zeros(1, 1), {})


def face() -> np.ndarray:
    """A smooth picture of CelebA's size, with two dark eyes where CelebA has them."""
    rows, columns = np.mgrid[0:218, 0:178]
    image = np.stack([columns, rows, 255 - rows], 2).astype(float)
    for x, y in EYES:
        image -= 150 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 60)[:, :, None]
    return image.clip(0, 255).astype(np.uint8)


def placed(scale: float, degrees: float, x: float, y: float) -> tuple[np.ndarray, Eyes]:
    """The face turned and scaled in a larger photo, and its eyes there."""
    turn = scale * np.exp(1j * np.radians(degrees))
    start = complex(x, y)
    inverse = 1 / turn
    offset = -start * inverse
    matrix = (inverse.real, -inverse.imag, offset.real, inverse.imag, inverse.real, offset.imag)
    photo = Image.fromarray(face()).transform(
        (900, 700), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(90, 90, 90)
    )
    left, right = (start + turn * complex(*eye) for eye in EYES)
    return np.array(photo), Eyes(left.real, left.imag, right.real, right.imag)


def difference(photo: np.ndarray) -> float:
    expected = resize(crop_centre(face(), 148)[None], 64)
    return float(np.abs(photo.astype(int) - expected).mean())


@pytest.mark.parametrize(("scale", "degrees", "x", "y"), [(1, 0, 40, 30), (2.7, 0, 50, 20), (2, 25, 260, 60)])
def test_a_face_anywhere_in_a_photo_is_seen_as_in_the_training_images(scale, degrees, x, y):
    photo, eyes = placed(scale, degrees, x, y)
    assert difference(fit(photo, CARD, eyes=eyes)) < 2.5  # grey levels
    assert difference(fit(photo, CARD)) > 10  # the centre alone shows something else


def test_a_training_image_with_the_usual_eyes_is_cut_as_in_training():
    (x1, y1), (x2, y2) = EYES
    assert difference(fit(face(), CARD, eyes=Eyes(x1, y1, x2, y2))) < 0.6


@pytest.mark.parametrize("crop", [-1, 179])
def test_a_crop_that_the_photo_does_not_have_is_refused(crop):
    with pytest.raises(ImageError, match=f"is 178x218 pixels; crop: got {crop}, expected 0 to 178"):
        fit(face(), CARD, crop)


def test_what_lies_outside_the_photo_repeats_its_edge():
    grey = np.full((60, 80, 3), 77, np.uint8)
    assert (fit(grey, CARD, eyes=Eyes(10, 10, 70, 14)) == 77).all()


def test_points_that_are_no_eyes_are_refused():
    photo = face()
    for eyes in (Eyes(50, 60, 51, 60), Eyes(-5, 60, 90, 60), Eyes(50, 60, 90, 400)):
        with pytest.raises(ImageError, match="two different points"):
            fit(photo, CARD, eyes=eyes)
    other = Card(ModelConfig(), 64, 148, None, ["Male"], [], torch.zeros(1, 1), {})
    with pytest.raises(ImageError, match="not aligned as CelebA"):
        fit(photo, other, eyes=Eyes(60, 100, 100, 100))


def test_eyes_are_read_in_any_order():
    assert parse_eyes("100,50,60,52") == parse_eyes("60, 52,100,50") == Eyes(60, 52, 100, 50)
    assert parse_eyes("") is None
    with pytest.raises(ConfigError, match="X1,Y1,X2,Y2"):
        parse_eyes("1,2,3")

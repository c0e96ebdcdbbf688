"""Conversion between levels 0 .. 255 and the range [-1, 1], and heads without their background."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config.load import load
from pipeline.data.loader import to_float
from pipeline.data.pixels import crop_centre, foreground, green_behind, put_behind, resize, to_uint8
from pipeline.data.sources.toy.attributes import NAMES, sample_attributes
from pipeline.data.sources.toy.faces import draw_face
from pipeline.data.sources.toy.style import sample_style
from pipeline.rundir import layout

GREEN = (0, 255, 0)


def test_uint8_conversion_is_the_inverse_of_to_float_and_rounds_and_clamps() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    x = torch.tensor([-1.4, -1.0, 0.0, 0.0 + 0.6 / 127.5, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]  # 127.5 rounds to even


@pytest.fixture(scope="module")
def toys() -> tuple[np.ndarray, np.ndarray]:
    """Drawn faces uint8 [12, 64, 64, 3], and the true share of the foreground [12, 64, 64]."""
    faces, truths = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        present = sample_attributes(rng.standard_normal((1, len(NAMES))))[0]
        attributes = {name for name, there in zip(NAMES, present, strict=True) if there} - {"Blurry"}
        style = sample_style(rng)
        drawn = [np.asarray(draw_face(attributes, style))]
        for colour in ((0, 0, 0), (255, 255, 255)):
            plain = replace(style, background=(colour,) * 4, light=(1.0,) * 4)
            drawn.append(np.asarray(draw_face(attributes, plain)))
        face, black, white = resize(np.stack([crop_centre(image, 148) for image in drawn]), 64)
        faces.append(face)
        truths.append(1 - (white.astype(float) - black).mean(2) / 255)
    return np.stack(faces), np.stack(truths)


def test_the_foreground_of_drawn_faces_is_found(toys: tuple[np.ndarray, np.ndarray]) -> None:
    faces, truth = toys
    found, wanted = foreground(faces).numpy() > 0.5, truth > 0.5
    overlap = (found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2))
    assert overlap.mean() > 0.9 and overlap.min() > 0.6


def test_a_background_becomes_green_and_then_any_other_one(toys: tuple[np.ndarray, np.ndarray]) -> None:
    faces, _ = toys
    green = green_behind(faces)
    share = foreground(faces).numpy()
    assert (green[share == 0] == GREEN).all()
    other = np.full((64, 64, 3), (30, 60, 200), np.uint8)
    composed = put_behind(green, other)
    assert (composed[share == 0] == other[0, 0]).all()
    inside = share == 1
    plain = faces[inside].astype(int)
    plain[:, 1] = np.minimum(plain[:, 1], plain[:, [0, 2]].max(1))
    assert (composed[inside] == plain).all()  # the person stays, without what outshines red and blue


def test_an_image_loses_its_background_whatever_its_neighbours_are(
    toys: tuple[np.ndarray, np.ndarray],
) -> None:
    faces, _ = toys
    assert np.array_equal(green_behind(faces[3:4])[0], green_behind(faces)[3])


def test_only_shards_without_background_have_another_digest() -> None:
    usual, keep, green = (
        layout.shards_digest(load([], overrides))
        for overrides in ([], ["shard.background=keep"], ["shard.background=green"])
    )
    assert usual == keep != green

"""The variation between faces that no attribute describes: identity, pose, light, background, clothes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.sources.toy.canvas import Colour, mix

SKIN: tuple[Colour, ...] = (
    (243, 205, 176),
    (229, 184, 148),
    (205, 154, 116),
    (164, 113, 78),
    (112, 74, 52),
)  # light to dark
EYES: tuple[Colour, ...] = ((74, 48, 30), (96, 66, 38), (84, 110, 70), (82, 122, 160))
VIVID: tuple[Colour, ...] = (
    (176, 40, 48),
    (36, 74, 150),
    (34, 110, 84),
    (116, 60, 130),
    (206, 140, 40),
    (60, 64, 72),
    (190, 190, 196),
)


@dataclass(frozen=True)
class Style:
    """The nuisance variation of one face. It is independent of the attributes."""

    skin: Colour
    eyes: Colour
    shirt: Colour
    accent: Colour  # hat, tie, eye shadow
    background: tuple[Colour, Colour, Colour, Colour]  # of the four corners
    tilt: float  # degrees
    x: float  # of the point between the eyes, pixels of the final image
    y: float
    size: float  # final pixels per unit of the face
    width: float  # proportions of this person, about 1
    length: float
    eye_gap: float
    eye_size: float
    nose: float
    mouth: float
    light: tuple[float, float, float, float]  # gain of the four corners, at most 1
    side: int  # -1 or 1: parting, crooked features
    seed: int  # of freckles and stubble


def sample_style(rng: np.random.Generator) -> Style:
    """Draw one style. It always consumes the same random numbers."""
    tone = 0.999 * rng.beta(1.1, 1.9) * (len(SKIN) - 1)
    corners = (
        rng.uniform(30, 225)
        + rng.uniform(-30, 30, 3)
        + rng.uniform(-45, 45, (4, 1))
        + rng.uniform(-15, 15, (4, 3))
    )
    light = rng.uniform(0.86, 1.0) * np.clip(1.0 + 0.14 * rng.standard_normal(4), 0.7, 1.0)
    near_one = 1.0 + rng.uniform(-1, 1, 6) * (0.05, 0.05, 0.06, 0.08, 0.1, 0.1)
    return Style(
        skin=mix(SKIN[int(tone)], SKIN[int(tone) + 1], tone % 1),
        eyes=EYES[rng.integers(len(EYES))],
        shirt=_colour(rng.uniform(20, 230) + rng.uniform(-60, 60, 3)),
        accent=VIVID[rng.integers(len(VIVID))],
        background=(_colour(corners[0]), _colour(corners[1]), _colour(corners[2]), _colour(corners[3])),
        tilt=float(np.clip(3.0 * rng.standard_normal(), -7, 7)),
        x=float(89 + rng.uniform(-3, 3)),
        y=float(110.5 + rng.uniform(-2.5, 2.5)),
        size=float(0.94 * (1 + rng.uniform(-0.04, 0.04))),
        width=float(near_one[0]),
        length=float(near_one[1]),
        eye_gap=float(near_one[2]),
        eye_size=float(near_one[3]),
        nose=float(near_one[4]),
        mouth=float(near_one[5]),
        light=(float(light[0]), float(light[1]), float(light[2]), float(light[3])),
        side=1 if rng.random() < 0.5 else -1,
        seed=int(rng.integers(2**31)),
    )


def _colour(values: np.ndarray) -> Colour:
    red, green, blue = np.clip(values, 0, 255).astype(int).tolist()
    return red, green, blue

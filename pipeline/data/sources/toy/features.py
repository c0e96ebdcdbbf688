"""Eyes, nose, mouth, glasses and earrings."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from pipeline.data.sources.toy.canvas import (
    Canvas,
    Colour,
    curve,
    darker,
    ellipse,
    lighter,
    mix,
    points,
    symmetric,
)
from pipeline.data.sources.toy.style import Style

EYE_X = 19.5  # distance of an eye from the middle of the face


def draw_eyes(canvas: Canvas, attributes: Set[str], style: Style, skin: Colour, hair: Colour) -> None:
    """Draw both eyes with lids, brows, bags and eye shadow.

    The features of a face that is not Attractive are a little crooked.
    """
    for side in (-1, 1):
        crooked = 0.0 if "Attractive" in attributes or side != style.side else 1.8
        x, y = side * EYE_X * style.eye_gap, crooked
        _lids(canvas, attributes, style, skin, side, x, y)
        _eye(canvas, attributes, style, side, x, y)
        _brow(canvas, attributes, mix(hair, (50, 36, 28), 0.6), side, x, y)


def _lids(
    canvas: Canvas, attributes: Set[str], style: Style, skin: Colour, side: int, x: float, y: float
) -> None:
    canvas.fill(ellipse(x, y - 2, 10, 6), darker(skin, 0.3), alpha=0.4, blur=2.5)
    if "Heavy_Makeup" in attributes:
        colour = mix(style.accent, (70, 40, 90), 0.55)
        shadow = curve(-10, -1, -7, -8, 1, -10, 11, -9, 13, -2, 1, 2) * (side, 1) + (x, y)
        canvas.fill(shadow, colour, alpha=0.85, blur=1.3)
    if "Bags_Under_Eyes" in attributes:
        bag = curve(-9, 5, 0, 7, 9, 5, 7, 10, 0, 12, -7, 10) + (x, y)
        canvas.fill(bag, mix(skin, (70, 30, 60), 0.55), alpha=0.8, blur=1.5)
        canvas.line(
            curve(x - 8, y + 9, x - 3, y + 12, x + 3, y + 12, x + 8, y + 9), mix(skin, (60, 25, 40), 0.5), 1.1
        )


def _eye(canvas: Canvas, attributes: Set[str], style: Style, side: int, x: float, y: float) -> None:
    """White, iris and pupil inside an almond of two parabolas."""
    wide = 9.2 * style.eye_size
    high = (1.9 if "Narrow_Eyes" in attributes else 4.7) * style.eye_size

    def inside(shape: np.ndarray) -> np.ndarray:
        reach = np.maximum(0, 1 - (shape[:, 0] / wide) ** 2)
        return np.stack([shape[:, 0], np.clip(shape[:, 1], -high * reach, 0.75 * high * reach)], axis=1) + (
            x,
            y,
        )

    across = np.linspace(-wide, wide, 13)
    upper, lower = np.stack([across, np.full(13, -9.0)], axis=1), np.stack([across, np.full(13, 9.0)], axis=1)
    canvas.fill(np.concatenate([inside(upper), inside(lower)[::-1]]), (240, 238, 234))
    canvas.fill(inside(ellipse(0, -0.4, 4.4, 4.4)), style.eyes)
    canvas.fill(inside(ellipse(0, -0.4, 2.1, 2.1)), (16, 14, 14))
    canvas.dots(points(x + 1.4, y - 1.5 if high > 3 else y - 0.6), (255, 255, 255), 0.8)
    made_up = "Heavy_Makeup" in attributes
    canvas.line(inside(upper), (20, 14, 14) if made_up else (52, 34, 28), 2.3 if made_up else 1.3)
    if "Male" not in attributes:
        lash = 6 if made_up else 3
        canvas.line(
            points(x + side * (wide - 1), y - 1, x + side * (wide + lash * 0.7), y - lash * 0.7),
            (24, 16, 16),
            1.5,
        )
    canvas.line(inside(lower), (120, 84, 70), 0.6)


def _brow(canvas: Canvas, attributes: Set[str], colour: Colour, side: int, x: float, y: float) -> None:
    male = "Male" in attributes
    thick = (3.1 if male else 2.1) + (2.6 if "Bushy_Eyebrows" in attributes else 0)
    inner, top, outer = (y - 11, y - 12.5, y - 11) if male else (y - 11.5, y - 13.5, y - 11)
    if "Arched_Eyebrows" in attributes:
        inner, top, outer = inner + 0.5, top - 5, outer + 1
    above = curve(
        x - side * 10,
        inner - thick / 2,
        x - side * 3,
        (inner + top) / 2 - thick / 2,
        x + side * 4,
        top - thick / 2,
        x + side * 12,
        outer,
    )
    below = curve(
        x + side * 12,
        outer,
        x + side * 4,
        top + thick / 2,
        x - side * 3,
        (inner + top) / 2 + thick / 2,
        x - side * 10,
        inner + thick / 2,
    )
    canvas.fill(np.concatenate([above, below]), colour)


def draw_nose(canvas: Canvas, attributes: Set[str], style: Style, skin: Colour) -> None:
    """Bridge, tip and nostrils: broad for a big nose, a sharp narrow wedge for a pointy one."""
    wide, tip, shade = 7.2 * style.nose, 21.0, darker(skin, 0.32)
    if "Big_Nose" in attributes:
        wide, tip = wide * 1.65, 24.5
    if "Pointy_Nose" in attributes:
        wide, tip = wide * 0.66, tip + 3
    flank = curve(3.5, -4, 4.5, 8, wide, tip - 3, wide * 0.4, tip) * (style.side, 1)
    canvas.fill(flank, shade, alpha=0.55, blur=1.5)
    canvas.fill(ellipse(0, tip - 3, wide * 0.55, 5), lighter(skin, 0.3), alpha=0.5, blur=2)
    for side in (-1, 1):
        canvas.fill(ellipse(side * wide * 0.8, tip - 1.5, wide * 0.28, 3.2), darker(skin, 0.14), blur=0.8)
        canvas.fill(ellipse(side * wide * 0.45, tip + 0.8, wide * 0.24, 1.3), darker(skin, 0.7))
    if "Pointy_Nose" in attributes:
        canvas.line(points(-wide * 1.1, tip - 4, 0, tip + 3.5, wide * 1.1, tip - 4), darker(skin, 0.46), 1.8)
        canvas.line(points(0, -2, 0, tip - 2), lighter(skin, 0.55), 1.8)
    else:
        canvas.line(curve(-wide * 0.75, tip + 1, 0, tip + 2.4, wide * 0.75, tip + 1), darker(skin, 0.36), 1.1)


def draw_mouth(canvas: Canvas, attributes: Set[str], style: Style, skin: Colour) -> None:
    """Draw lips between four curves.

    An open mouth shows teeth. A smile is wide, with raised corners and dimples.
    """
    smiling, opened = "Smiling" in attributes, "Mouth_Slightly_Open" in attributes
    wide = (18.5 if smiling else 13.5) * style.mouth
    lift = 4.0 if smiling else -0.2
    gap = (7.0 if smiling else 5.5) if opened else 0.0
    thick = 5.6 if "Big_Lips" in attributes else 3.1
    red = mix(skin, (178, 78, 78), 0.4 if "Male" in attributes else 0.55)
    if "Wearing_Lipstick" in attributes:
        red = ((196, 22, 44), (214, 40, 98), (150, 20, 60))[style.seed % 3]
    y, crooked = 37.5, 0.0 if "Attractive" in attributes else style.side * 0.9

    def across(middle: float, power: float = 2.0, dip: float = 0.0) -> np.ndarray:
        t = np.linspace(-1, 1, 15)
        corner = y - lift + crooked * t
        return np.stack(
            [
                wide * t,
                corner + (middle - y + lift) * (1 - np.abs(t) ** power) + dip * np.exp(-((t / 0.18) ** 2)),
            ],
            axis=1,
        )

    top, bottom = y - gap * 0.4, y + gap * 0.6 + (1.5 if smiling else 0)
    canvas.fill(np.concatenate([across(top - thick, dip=0.9), across(bottom + thick * 1.15)[::-1]]), red)
    canvas.fill(
        ellipse(0, bottom + thick * 0.6, wide * 0.35, thick * 0.25), lighter(red, 0.4), alpha=0.5, blur=1
    )
    if opened:
        canvas.fill(np.concatenate([across(top), across(bottom)[::-1]]), (64, 16, 20))
        canvas.fill(np.concatenate([across(top)[2:-2], across(top + gap * 0.55)[-3:1:-1]]), (246, 244, 238))
    else:
        canvas.line(across(top + 0.6), darker(red, 0.55), 1.2)
    if smiling:
        for side in (-1, 1):
            canvas.line(
                curve(side * (wide + 1), y - 9, side * (wide + 4), y - 5, side * (wide + 3), y),
                darker(skin, 0.35),
                1.2,
            )


def draw_accessories(canvas: Canvas, attributes: Set[str], style: Style) -> None:
    """Draw eyeglasses and earrings."""
    if "Eyeglasses" in attributes:
        frame = (24, 22, 24) if style.seed % 3 else (96, 50, 26)
        for side in (-1, 1):
            x = side * EYE_X * style.eye_gap
            rim = symmetric(curve(0, -9, 9, -9, 14, -6, 13.5, 5, 8, 10, 0, 10.5)) + (x, 1)
            canvas.fill(rim, (226, 240, 255), alpha=0.16)
            canvas.line(np.concatenate([rim, rim[:1]]), frame, 2.0)
            canvas.line(points(x + side * 13.5, -2, side * 41, -3), frame, 1.8)
        canvas.line(curve(-6.5, 0, 0, -2.5, 6.5, 0), frame, 2.0)
    if "Wearing_Earrings" in attributes:
        metal = (250, 206, 72) if style.seed % 2 else (240, 242, 250)
        for side in (-1, 1):
            x = side * 41.5 * style.width
            canvas.fill(ellipse(x, 24, 4.2, 8.5), darker(metal, 0.35))
            canvas.fill(ellipse(x, 24, 3.0, 7.0), metal)
            canvas.dots(points(x, 15.5), lighter(metal, 0.5), 1.8)

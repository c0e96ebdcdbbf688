"""Draw one face, from back to front."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from pipeline.data.sources.toy import features, hair
from pipeline.data.sources.toy.canvas import (
    HEIGHT,
    SCALE,
    WIDTH,
    Canvas,
    Colour,
    curve,
    darker,
    ellipse,
    lighter,
    mix,
    points,
    smooth,
    symmetric,
)
from pipeline.data.sources.toy.style import Style


def draw_face(attributes: Set[str], style: Style) -> Image.Image:
    """Draw a face that shows `attributes` (official names), an RGB image of 178 x 218 pixels.

    The result is a pure function of both arguments.
    """
    big = (WIDTH * SCALE, HEIGHT * SCALE)
    image = _gradient(style.background, big)
    canvas = Canvas(image, style.x, style.y, style.tilt, style.size)
    skin = skin_colour(attributes, style)
    colour = hair.hair_colour(attributes, style)
    outline = head_outline(attributes, style)
    hair.draw_back(canvas, attributes, style, colour)
    _body(canvas, attributes, style, skin)
    _head(canvas, attributes, style, skin, outline)
    _skin_marks(canvas, attributes, style, skin)
    hair.draw_beard(canvas, attributes, style, colour, skin, outline)
    features.draw_nose(canvas, attributes, style, skin)
    features.draw_mouth(canvas, attributes, style, skin)
    features.draw_eyes(canvas, attributes, style, skin, colour)
    hair.draw_front(canvas, attributes, style, colour)
    features.draw_accessories(canvas, attributes, style)
    shade = _gradient([(round(255 * gain),) * 3 for gain in style.light], (WIDTH, HEIGHT))
    final = ImageChops.multiply(image.reduce(SCALE), shade)
    return final.filter(ImageFilter.GaussianBlur(3.2)) if "Blurry" in attributes else final


def skin_colour(attributes: Set[str], style: Style) -> Colour:
    """Return the colour of this person's skin. Pale skin is lighter than any other."""
    return mix((252, 234, 226), style.skin, 0.12) if "Pale_Skin" in attributes else style.skin


def head_outline(attributes: Set[str], style: Style) -> np.ndarray:
    """Return the closed outline of the face, crown to chin, in face coordinates."""
    cheek, jaw, chin, length = 38.0, 31.0, 11.0, 57.0
    if "Male" in attributes:
        cheek, jaw, chin, length = 39.0, 35.5, 15.0, 59.0
    if "Oval_Face" in attributes:
        cheek, jaw, chin, length = cheek - 2, jaw - 3.5, chin - 1, length + 3
    if "Chubby" in attributes:
        cheek, jaw, chin = cheek + 5, jaw + 6.5, chin + 7
    right = points(
        0, -60, 20, -56, 34, -40, cheek, -16, cheek + 0.5, 4, cheek - 1.5, 22,
        jaw, 38, (jaw + chin) / 2, length - 8, chin * 0.7, length - 1, 0, length,
    )  # fmt: skip
    return symmetric(smooth(right * (style.width, style.length)))


def _gradient(corners: Sequence[tuple[int, ...]], size: tuple[int, int]) -> Image.Image:
    """Return an image whose colour runs bilinearly between its four corners."""
    image = Image.new("RGB", (2, 2))
    image.putdata(corners)
    coarse = image.resize((size[0] // 4, size[1] // 4), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    return coarse.resize(size, Image.Resampling.NEAREST)  # much faster; a step is about one grey level


def _body(canvas: Canvas, attributes: Set[str], style: Style, skin: Colour) -> None:
    """Draw neck, shoulders and clothes, then necktie and necklace."""
    male, tie = "Male" in attributes, "Wearing_Necktie" in attributes
    neck = (25 if male else 20) + (6 if "Chubby" in attributes else 0)
    shirt = darker(style.shirt, 0.6) if tie else style.shirt
    canvas.fill(symmetric(curve(0, 58, neck + 4, 62, neck + 22, 72, 80, 84, 100, 130)), shirt)
    depth = 84 if male else 96
    canvas.fill(
        symmetric(curve(0, 20, neck, 24, neck, 50, neck + 3, 64, neck - 2, depth - 8, 0, depth)),
        darker(skin, 0.1),
    )
    canvas.fill(
        symmetric(curve(0, 40, neck - 2, 42, neck - 6, 58, 0, 68)), darker(skin, 0.38), alpha=0.8, blur=2.5
    )
    if "Double_Chin" in attributes:
        bulge = symmetric(curve(0, 40, 30, 40, 28, 58, 14, 67, 0, 69))
        canvas.fill(bulge, darker(skin, 0.05))
        canvas.line(bulge, darker(skin, 0.4), 1.4)
    if tie:
        canvas.fill(symmetric(points(0, 72, neck + 4, 58, neck + 8, 74, 14, 96, 0, 110)), (246, 246, 244))
        canvas.fill(symmetric(points(0, 66, 7, 66, 5, 77, 11, 110, 0, 112)), style.accent)
        canvas.line(points(-5, 77, 5, 77), darker(style.accent, 0.5), 1.2)
    if "Wearing_Necklace" in attributes:
        _necklace(canvas, style, neck)


def _necklace(canvas: Canvas, style: Style, neck: float) -> None:
    right = curve(neck + 1, 57, neck * 0.72, 67, neck * 0.3, 71.5, 0, 73)
    path = np.concatenate([right, right[-2::-1] * (-1, 1)])
    metal = (244, 200, 70) if style.seed % 2 else (246, 246, 250)
    canvas.line(path, darker(metal, 0.55), 3.0)
    canvas.dots(path[::3], metal, 2.1)


def _head(canvas: Canvas, attributes: Set[str], style: Style, skin: Colour, outline: np.ndarray) -> None:
    """Draw the ears, the face, and the soft shading that makes it round."""
    for side in (-1, 1):
        canvas.fill(ellipse(side * 39.5 * style.width, 5, 6, 11), darker(skin, 0.12))
        canvas.fill(ellipse(side * 40 * style.width, 5, 3, 7), darker(skin, 0.3))
    canvas.fill(outline, skin)
    if "Double_Chin" in attributes:
        canvas.line(curve(-17, 55, -9, 59.5, 0, 61, 9, 59.5, 17, 55), darker(skin, 0.4), 1.6)
    for side, depth in ((-style.side, 0.3), (style.side, 0.16)):
        canvas.fill(ellipse(side * 31 * style.width, 12, 3.5, 30), darker(skin, depth), alpha=0.55, blur=4)
    canvas.fill(ellipse(style.side * -6, -32, 17, 8), lighter(skin, 0.4), alpha=0.35, blur=6)
    canvas.fill(ellipse(0, 48.5, 7, 3), lighter(skin, 0.3), alpha=0.35, blur=3)


def _skin_marks(canvas: Canvas, attributes: Set[str], style: Style, skin: Colour) -> None:
    """Draw cheeks, make-up, blemishes and lines of age."""
    for side in (-1, 1):
        if "High_Cheekbones" in attributes:
            canvas.fill(ellipse(side * 24, 15, 8, 4.5), lighter(skin, 0.5), alpha=0.65, blur=2.5)
            hollow = curve(35, 20, 27, 28, 21, 36, 25, 36, 33, 32) * (side, 1)
            canvas.fill(hollow, darker(skin, 0.4), alpha=0.65, blur=2.5)
        if "Rosy_Cheeks" in attributes:
            canvas.fill(ellipse(side * 25, 21, 9, 7), mix(skin, (236, 60, 70), 0.75), alpha=0.75, blur=3)
        if "Heavy_Makeup" in attributes:
            blush = curve(34, 8, 26, 18, 18, 25, 26, 24) * (side, 1)
            canvas.fill(blush, mix(skin, (190, 70, 90), 0.6), alpha=0.6, blur=2.5)
    if "Attractive" in attributes:
        canvas.fill(ellipse(0, 8, 1.6, 12), lighter(skin, 0.6), alpha=0.5, blur=1.5)
        canvas.fill(ellipse(0, -26, 16, 7), lighter(skin, 0.45), alpha=0.5, blur=4)
    else:
        rng = np.random.default_rng(style.seed)
        canvas.dots(rng.uniform((-31, -22), (31, 46), (26, 2)), mix(skin, (130, 60, 40), 0.4), 0.7)
    if "Young" not in attributes:
        _lines_of_age(canvas, mix(skin, (70, 30, 20), 0.45))


def _lines_of_age(canvas: Canvas, colour: Colour) -> None:
    for y in (-36, -30, -24):
        canvas.line(curve(-20, y + 1, -9, y - 1, 0, y, 9, y - 1, 20, y + 1), colour, 1.4)
    for side in (-1, 1):
        canvas.line(curve(side * 10, 21, side * 16, 27, side * 20, 36, side * 20, 41), colour, 1.7)
        for y in (-4, 0, 4):
            canvas.line(points(side * 31, y * 0.5, side * 36, y), colour, 1.2)

"""Hair, beard and hat."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from pipeline.data.sources.toy.canvas import Canvas, Colour, curve, darker, ellipse, lighter, mix, symmetric
from pipeline.data.sources.toy.style import Style

COLOURS: dict[str, Colour] = {
    "Black_Hair": (26, 22, 24),
    "Blond_Hair": (226, 188, 108),
    "Brown_Hair": (98, 60, 34),
    "Gray_Hair": (176, 178, 182),
}
AUBURN: Colour = (142, 64, 36)  # if no colour is annotated


def hair_colour(attributes: Set[str], style: Style) -> Colour:
    """Return the colour of hair and beard. Each person has another shade."""
    base = next((colour for name, colour in COLOURS.items() if name in attributes), AUBURN)
    shade = (style.seed % 101) / 100 * 0.24 - 0.12
    return lighter(base, shade) if shade > 0 else darker(base, -shade)


def _waves(path: np.ndarray, height: float, length: float) -> np.ndarray:
    """Push a path in and out along its normal, in bumps of `length`."""
    step = np.gradient(path, axis=0)
    norm = np.hypot(step[:, 0], step[:, 1])
    along = np.cumsum(norm)
    normal = np.stack([step[:, 1], -step[:, 0]], axis=1) / norm[:, None]
    return path + normal * (height * np.sin(2 * np.pi * along / length))[:, None]


def draw_back(canvas: Canvas, attributes: Set[str], style: Style, colour: Colour) -> None:
    """Draw the hair behind neck and head: long, or a bob if it is neither straight nor wavy."""
    if "Male" in attributes or "Bald" in attributes:
        return
    straight, wavy = "Straight_Hair" in attributes, "Wavy_Hair" in attributes
    if straight or wavy:
        right = curve(0, -66, 32, -54, 47, -20, 52, 20, 56, 60, 58, 110, 0, 110)
    else:
        right = curve(0, -66, 32, -54, 46, -20, 50, 14, 46, 38, 30, 46, 0, 46)
    if wavy:
        right[:-6] = _waves(right[:-6] * (1.08, 1), 3.2, 19)
    canvas.fill(symmetric(right * (style.width, 1)), darker(colour, 0.3))


def draw_front(canvas: Canvas, attributes: Set[str], style: Style, colour: Colour) -> None:
    """Draw the hair on the head and beside the face, fringe, sideburns and hat."""
    if "Bald" in attributes:
        canvas.fill(ellipse(style.side * -8, -48, 11, 5), (255, 255, 255), alpha=0.5, blur=3)
    else:
        _cap(canvas, attributes, style, colour)
        if "Male" not in attributes:
            _locks(canvas, attributes, style, colour)
    if "Sideburns" in attributes:
        for side in (-1, 1):
            strip = curve(39, -22, 31, -14, 31, 10, 29, 27, 36, 29, 39.5, 10)
            canvas.fill(strip * (side * style.width, 1), colour)
    if "Wearing_Hat" in attributes:
        _hat(canvas, style)


def _cap(canvas: Canvas, attributes: Set[str], style: Style, colour: Colour) -> None:
    """Fill the area between the hair's outline and the hairline."""
    male, wavy = "Male" in attributes, "Wavy_Hair" in attributes
    thick = 2.0 if "Receding_Hairline" in attributes else 6.0
    if male and "Straight_Hair" in attributes:
        thick += 5  # combed up
    low = -8 if male else 0
    outer = curve(43, low, 43.5, -24, 37 + thick / 2, -46, 21, -61 - thick, 0, -63 - thick) * (
        style.width,
        style.length,
    )
    outer = _waves(np.concatenate([outer, outer[-2::-1] * (-1, 1)]), 2.6 if wavy else 0.0, 13)
    hairline = _hairline(attributes, style.side, low) * (style.width, style.length)
    canvas.fill(np.concatenate([outer, hairline]), colour)
    _strands(canvas, attributes, style, colour)


def _hairline(attributes: Set[str], side: int, low: float) -> np.ndarray:
    """Return the line where hair meets the forehead, left to right.

    It lies far back at the temples, is a fringe above the brows, or is parted on one side.
    """
    if "Receding_Hairline" in attributes:
        return curve(
            -37,
            low,
            -36,
            -28,
            -28,
            -47,
            -20,
            -56,
            -9,
            -50,
            0,
            -47,
            9,
            -50,
            20,
            -56,
            28,
            -47,
            36,
            -28,
            37,
            low,
        )
    if "Bangs" in attributes:
        return curve(
            -37,
            low,
            -34,
            -16,
            -27,
            -17,
            -18,
            -15,
            -9,
            -17,
            0,
            -15,
            9,
            -17,
            18,
            -15,
            27,
            -17,
            34,
            -16,
            37,
            low,
        )
    return curve(-37, low, -35, -22, -28, -35, -14, -41, side * 12, -45, 16, -40, 28, -35, 35, -22, 37, low)


def _strands(canvas: Canvas, attributes: Set[str], style: Style, colour: Colour) -> None:
    """Draw light and dark streaks, straight or wavy. Hair that is neither only has a soft shine."""
    straight, wavy = "Straight_Hair" in attributes, "Wavy_Hair" in attributes
    if not (straight or wavy):
        canvas.fill(ellipse(style.side * -12, -56, 13, 4), lighter(colour, 0.35), alpha=0.6, blur=2.5)
        return
    end = -19 if "Bangs" in attributes else -58 if "Receding_Hairline" in attributes else -47
    for i, x in enumerate(range(-30, 31, 5)):
        top = -64 + abs(x) ** 2 / 75
        path = curve(x * 0.8, top, x * 0.95, (top + end) / 2, x, max(end + abs(x) / 4, top + 7))
        path = _waves(path, 1.5, 9) if wavy else path
        canvas.line(path, lighter(colour, 0.22) if i % 2 else darker(colour, 0.3), 1.3)


def _locks(canvas: Canvas, attributes: Set[str], style: Style, colour: Colour) -> None:
    """Draw the hair that falls beside the face."""
    straight, wavy = "Straight_Hair" in attributes, "Wavy_Hair" in attributes
    for side in (-1, 1):
        inner, outer = (
            curve(30, -36, 37, -20, 38.5, 6, 38, 32, 41, 62, 42, 110),
            curve(59, 110, 56, 60, 52, 20, 47, -20, 34, -46),
        )
        if not (straight or wavy):
            inner, outer = (
                curve(30, -36, 37, -20, 39, 4, 38, 24, 34, 42),
                curve(45, 36, 50, 16, 47, -14, 34, -46),
            )
        if wavy:
            inner, outer = _waves(inner, 2.2, 21), _waves(outer * (1.08, 1), 3.2, 19)
        canvas.fill(np.concatenate([inner, outer]) * (side * style.width, 1), colour)
        for i, x in enumerate((43.0, 46.5, 50.0)):
            if straight or wavy:
                path = curve(x - 4, -26, x, 10, x + 2, 50, x + 4, 105)
                canvas.line(
                    (_waves(path, 2.4, 21) if wavy else path) * (side * style.width, 1),
                    lighter(colour, 0.2) if i % 2 else darker(colour, 0.3),
                    1.4,
                )


def _hat(canvas: Canvas, style: Style) -> None:
    crown = symmetric(curve(0, -88, 26, -84, 41, -64, 45, -34, 0, -28))
    canvas.fill(crown * (style.width, 1), style.accent)
    canvas.fill(ellipse(style.side * -12, -66, 12, 9), lighter(style.accent, 0.4), alpha=0.5, blur=4)
    band = symmetric(curve(0, -42, 30, -43, 47, -46, 52, -34, 46, -29, 24, -27, 0, -26))
    canvas.fill(band * (style.width, 1), darker(style.accent, 0.4))


def draw_beard(
    canvas: Canvas, attributes: Set[str], style: Style, colour: Colour, skin: Colour, outline: np.ndarray
) -> None:
    """Draw stubble, goatee and mustache.

    A full beard appears if No_Beard is false and neither these nor sideburns are annotated.
    """
    goatee, mustache, stubble = (
        "Goatee" in attributes,
        "Mustache" in attributes,
        "5_o_Clock_Shadow" in attributes,
    )
    beard = mix(colour, (40, 30, 26), 0.3)
    jaw = outline[outline[:, 1] > 12]
    area = np.concatenate([jaw, curve(-36, 14, -29, 24, -20, 29, 0, 26, 20, 29, 29, 24, 36, 14)])
    if stubble:
        canvas.fill(area, mix(skin, (44, 44, 56), 0.6), alpha=0.7, blur=2.0)
        rng = np.random.default_rng(style.seed + 1)
        x, y = rng.uniform(-32, 32, 110), rng.uniform(27, 56, 110)
        inside = np.abs(x) < 34 - (y - 27) * 0.7
        canvas.dots(np.stack([x, y], axis=1)[inside], darker(skin, 0.65), 0.6)
    if "No_Beard" not in attributes and not (goatee or mustache or stubble or "Sideburns" in attributes):
        canvas.fill(area, beard, alpha=0.95, blur=1.2)
        mustache = True
    if goatee:
        canvas.fill(symmetric(curve(0, 43, 8, 42, 14, 46, 14, 56, 8, 63, 0, 65)), beard, alpha=0.95, blur=1.0)
    if mustache:
        canvas.fill(
            symmetric(curve(0, 27, 8, 27, 15, 32, 18, 39, 13, 37, 0, 32.5)), beard, alpha=0.97, blur=0.7
        )

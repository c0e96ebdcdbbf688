"""Contact sheets: images with their labels, as a picture or as a page."""

from __future__ import annotations

import base64
import html
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.runtime.split import ceil_div

SIDE = 112  # of a thumbnail, pixels
COLUMNS = 8
GAP = 12  # pixels
LINES = 4  # of labels below an image; what is left is counted
LINE = 13  # pixels
FONT_SIZE = 11
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_STYLE = (
    "body{font:14px/1.4 sans-serif;margin:24px;color:#222}pre{background:#f4f4f4;padding:12px;overflow:auto}"
    ".sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:16px}"
    "figure{margin:0;break-inside:avoid}img{width:100%;aspect-ratio:1;object-fit:contain;"
    "border:1px solid #ccc;box-sizing:border-box}"
    "figcaption{font-size:12px;overflow-wrap:anywhere}b{display:block}"
)


class Shown(NamedTuple):
    """One image and what is known of it."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    key: str
    split: str
    names: list[str]  # of the attributes that it has


def contact_sheet(images: list[Shown]) -> bytes:
    """Return a PNG of all images: key, split and attributes below each."""
    font = ImageFont.load_default(FONT_SIZE)
    cell_height = SIDE + (LINES + 1) * LINE + GAP
    rows = max(1, ceil_div(len(images), COLUMNS))
    width = COLUMNS * (SIDE + GAP) + GAP
    canvas = Image.new("RGB", (width, rows * cell_height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for position, shown in enumerate(images):
        left = GAP + position % COLUMNS * (SIDE + GAP)
        top = GAP + position // COLUMNS * cell_height
        thumbnail = _thumbnail(shown.pixels)
        x, y = left + (SIDE - thumbnail.width) // 2, top + (SIDE - thumbnail.height) // 2
        pen.rectangle((x - 1, y - 1, x + thumbnail.width, y + thumbnail.height), outline="#cccccc")
        canvas.paste(thumbnail, (x, y))
        lines = [_fitted(f"{shown.split} {shown.key}", pen, font), *_lines(shown.names, pen, font)]
        for number, line in enumerate(lines):
            colour = "#555555" if number == 0 else "#111111"
            pen.text((left, top + SIDE + 2 + number * LINE), line, colour, font)
    return _png(canvas)


def contact_page(images: list[Shown], text: str, command: str) -> bytes:
    """Return an HTML page that needs no other file: the text, the command and all images."""
    figures = []
    for shown in images:
        data = base64.b64encode(_png(_thumbnail(shown.pixels))).decode()
        names = html.escape(", ".join(shown.names) or "no attribute")
        title = html.escape(f"{shown.split} {shown.key}")
        image = f'<img src="data:image/png;base64,{data}" alt="{title}">'
        figures.append(f"<figure>{image}<figcaption><b>{title}</b>{names}</figcaption></figure>")
    head = f'<meta charset="utf-8"><title>Contact sheet</title><style>{_STYLE}</style>'
    body = f"<h1>Contact sheet</h1><pre>{html.escape(text)}\n\n{html.escape(command)}</pre>"
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}<div class="sheet">'
    return (page + "\n".join(figures) + "</div></body></html>\n").encode()


def _thumbnail(pixels: np.ndarray) -> Image.Image:
    """Return the image with its longer side at SIDE."""
    image = Image.fromarray(pixels)
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _lines(names: list[str], pen: ImageDraw.ImageDraw, font: Font) -> list[str]:
    """Return at most LINES lines with names; the last one counts those left out."""
    if not names:
        return ["no attribute"]
    if len(names) <= LINES:
        return [_fitted(name, pen, font) for name in names]
    left_out = len(names) - (LINES - 1)
    return [*(_fitted(name, pen, font) for name in names[: LINES - 1]), f"and {left_out} more"]


def _fitted(text: str, pen: ImageDraw.ImageDraw, font: Font) -> str:
    """Return the text, cut so that it is not wider than a thumbnail."""
    if pen.textlength(text, font) <= SIDE:
        return text
    while text and pen.textlength(f"{text}…", font) > SIDE:
        text = text[:-1]
    return f"{text}…"


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()

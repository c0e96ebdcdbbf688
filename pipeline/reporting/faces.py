"""Cut the grids of an evaluation into faces that a page can wrap, label and enlarge."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.rundir import layout
from pipeline.rundir.record import read_json

SHOWN_SIDE = 128  # pixels of the screen; a smaller face is enlarged by a whole number
QUALITY = 90  # of WebP
SMALL_QUALITY = 75  # for faces that need no enlargement


@dataclass(frozen=True)
class Row:
    """Faces side by side. A face may be a stack, such as an image above its reconstruction."""

    label: str
    faces: list[bytes]  # WebP
    width: int  # of each face on the screen, pixels
    height: int

    def under(self, label: str) -> Row:
        """The same faces under another label."""
        return replace(self, label=label)


@dataclass(frozen=True)
class Sheet:
    """One picture of an evaluation, cut into rows of faces."""

    name: str
    title: str
    caption: str
    file: Path
    contents: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """Labels of the rows; empty if they have none."""
        return list(self.contents["labels"])

    @property
    def rows_there(self) -> int:
        """Number of rows of stacks."""
        images = self.contents["columns"] * self.contents["stack"]
        return -(-self.contents["count"] // images)

    def rows(self, first: int = 0, last: int | None = None) -> Iterator[Row]:
        """Cut the rows `first` to `last` (not included; None: all) into faces.

        Rows without labels become one, which wraps as it likes.
        """
        stop = self.rows_there if last is None else min(last, self.rows_there)
        with Image.open(self.file) as opened:
            image = opened.convert("RGB")
        width, height = self._shown_size()
        unlabelled: list[bytes] = []
        for row in range(first, stop):
            if self.labels:
                yield Row(self.labels[row], self._cut(image, row), width, height)
            else:
                unlabelled += self._cut(image, row)
        if unlabelled:
            yield Row("", unlabelled, width, height)

    def _cut(self, image: Image.Image, row: int) -> list[bytes]:
        side, gap, stack = (self.contents[key] for key in ("side", "gap", "stack"))
        columns, count = self.contents["columns"], self.contents["count"]
        step = side + gap
        there = columns if stack > 1 else min(columns, count - row * columns)
        found = []
        for column in range(there):
            left, top = gap + column * step, gap + row * stack * step
            box = (left, top, left + side, top + stack * step - gap)
            found.append(_webp(image.crop(box), side))
        return found

    def _shown_size(self) -> tuple[int, int]:
        """Width and height of a face on the screen: enlarged by a whole number until it can be judged."""
        side, gap, stack = (self.contents[key] for key in ("side", "gap", "stack"))
        times = -(-SHOWN_SIDE // side)
        return times * side, times * (stack * (side + gap) - gap)


def sheets(folder: Path) -> list[Sheet]:
    """Return the pictures of a folder that say what they show, in their order; old ones say nothing."""
    found = []
    for name, contents in (read_json(folder / layout.PICTURES) or {}).items():
        file = folder / f"{name}.png"
        if file.exists():
            found.append(Sheet(name, contents["title"], contents["caption"], file, contents))
    return found


def webp_file(file: Path) -> tuple[bytes, int]:
    """Return a whole picture as WebP, and its width in pixels."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    return _webp(image, image.width), image.width


def _webp(image: Image.Image, side: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY if side < SHOWN_SIDE else SMALL_QUALITY, method=4)
    return buffer.getvalue()

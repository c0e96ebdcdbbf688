"""Images as files below one folder."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.sources.decode import ENDINGS, decode, read_image_file

MAX_BYTES = 1 << 28  # of one image file


@dataclass(frozen=True)
class FolderImages:
    """Reads images by their path below `folder`."""

    folder: Path
    expected: tuple[int, int] | None = None  # (height, width) of every image; None: sizes differ

    def read(self, name: str) -> np.ndarray:
        """Return the pixels of one image, uint8 [H, W, 3]. Raises ImageError."""
        return decode(self.read_bytes(name), self.expected)

    def read_bytes(self, name: str) -> bytes:
        """Return the file of one image. Raises ImageError if it cannot be read."""
        return read_image_file(self.folder / name, MAX_BYTES)

    def where(self, name: str) -> str:
        """Return the path of one image, for messages."""
        return str(self.folder / name)


def files_below(folder: Path) -> dict[str, int]:
    """Return the path below `folder` and the bytes of every image file, at any depth.

    Hidden files and folders, macOS's leftovers, links to folders and links to nothing are left out.
    """
    found: dict[str, int] = {}
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        below = Path(at).relative_to(folder)
        for name in sorted(files):
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                with suppress(OSError):
                    found[str(below / name)] = (Path(at) / name).stat().st_size
    return found


def holds_image(folder: Path) -> bool:
    """Return whether any image file is below `folder`."""
    for _, _, files in os.walk(folder):
        if any(name.lower().endswith(ENDINGS) and not name.startswith(".") for name in files):
            return True
    return False

"""The images of CelebA: a folder or a zip of aligned JPEGs (or PNGs), listed without opening them."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.data.sources.base import ImageError
from pipeline.data.sources.celeba_annotations import IMAGE_NAME, refuse_html
from pipeline.data.sources.celeba_names import HEIGHT, IMAGE_FOLDERS, WIDTH
from pipeline.data.sources.decode import decode, read_image_file
from pipeline.errors import DataError

MAX_BYTES = 1 << 22  # of one image file; an aligned JPEG has about 7 kB


@dataclass(frozen=True)
class CelebaImages:
    """Reads images by file name from a folder, or from one folder within a zip."""

    place: Path  # the folder or the zip
    inside: str = ""  # folder within the zip, "" or ending in "/"

    def read(self, name: str) -> np.ndarray:
        """Return the pixels of one image, uint8 [218, 178, 3]. Raises ImageError."""
        return decode(self.read_bytes(name), (HEIGHT, WIDTH))

    def read_bytes(self, name: str) -> bytes:
        """Return the file of one image. Raises ImageError if it cannot be read."""
        if self.place.is_dir():
            return read_image_file(self.place / name, MAX_BYTES)
        try:
            with open_zip(self.place).open(self.inside + name) as member:
                content = member.read(MAX_BYTES + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            # RuntimeError: the member is encrypted, or its method is unknown.
            raise ImageError(f"cannot be unpacked ({error})") from None
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})") from None
        if len(content) > MAX_BYTES:
            raise ImageError(f"is larger than {MAX_BYTES} bytes")
        return content

    def where(self, name: str) -> str:
        """Return the path of one image, for messages."""
        return str(self.place / name)


def list_images(place: Path) -> tuple[CelebaImages, dict[str, int]]:
    """Find the images in a folder or zip: their reader, and each name with its size in bytes.

    Other files are left alone. Raises DataError.
    """
    images, found = _list_folder(place) if place.is_dir() else _list_zip(place)
    if not found:
        raise DataError(f"{place}: holds no image; expected {IMAGE_FOLDERS[0]}/000001.jpg and so on")
    return images, found


def _list_folder(folder: Path) -> tuple[CelebaImages, dict[str, int]]:
    """List a folder, or the folder of the same kind within it, as Kaggle's archive has it."""
    inner = [folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()]
    if inner:
        return _list_folder(inner[0])
    found: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if IMAGE_NAME.fullmatch(entry.name) and entry.is_file():
                found[entry.name] = entry.stat().st_size
    return CelebaImages(folder), found


def _list_zip(file: Path) -> tuple[CelebaImages, dict[str, int]]:
    """List the folder of a zip that holds most images: one named as CelebA's, or the top of the zip."""
    open_zip.cache_clear()  # the file may have been replaced
    by_folder: dict[str, dict[str, int]] = defaultdict(dict)
    for info in open_zip(file).infolist():
        folder, _, name = info.filename.rpartition("/")
        if _is_image_folder(folder) and IMAGE_NAME.fullmatch(name):
            inside = f"{folder}/" if folder else ""
            by_folder[inside][name] = info.file_size
    if not by_folder:
        return CelebaImages(file), {}
    inside = max(sorted(by_folder), key=lambda folder: len(by_folder[folder]))
    return CelebaImages(file, inside), by_folder[inside]


def _is_image_folder(folder: str) -> bool:
    """Return whether a folder of a zip may hold the images. A path that leads outside never does."""
    parts = folder.removeprefix("./").split("/")
    if "__MACOSX" in parts or ".." in parts:
        return False
    return parts in ([""], ["."]) or parts[-1] in IMAGE_FOLDERS


@lru_cache(maxsize=1)
def open_zip(file: Path) -> zipfile.ZipFile:
    """Open a zip once per process. Raises DataError if it is not complete."""
    try:
        with file.open("rb") as start:
            refuse_html(str(file), start.read(512), "a zip archive")
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        size = file.stat().st_size
        raise DataError(
            f"{file}: is no complete zip archive ({error}; {size} bytes); "
            "the download was cut short: download it again"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); mend it, or copy it again") from None

"""Any folder of images with a CSV of binary attributes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.data.sources.base import Source
from pipeline.data.sources.dataset import DataSet, Rows, bytes_of, facts_of, fields_of, key_of
from pipeline.data.sources.decode import ENDINGS
from pipeline.data.sources.facts import with_own_facts
from pipeline.data.sources.folder.images import FolderImages, files_below, holds_image
from pipeline.data.sources.folder.table import read_table
from pipeline.errors import DataError

KIND = "images+csv"


class ImagesWithTable(DataSet):
    """Images below a folder, and one CSV in it; see `base.Source`."""

    expects: ClassVar[str] = "images (.jpg, .png, .webp) and one .csv of binary attributes"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether a CSV is in the folder, and an image somewhere below it."""
        return bool(_tables(folder)) and holds_image(folder)

    @classmethod
    def estimate(cls, folder: Path) -> tuple[int, int]:
        """Return the numbers of rows and columns of the CSV."""
        file = _table(folder)
        with file.open("rb") as lines:
            columns = lines.readline().count(b",")
            return sum(1 for _ in lines), max(1, columns)

    @classmethod
    def open(cls, folder: Path, allow_subset: bool = False) -> Source:
        """Read and check the CSV and the list of images. Raises DataError."""
        file = _table(folder)
        table = read_table(file)
        sizes = files_below(folder)
        if not sizes:
            raise DataError(
                f"{folder}: holds no image; expected .jpg, .png or .webp files, in any folder below"
            )
        names = _paths(file, table.names, sizes)
        present = np.array([name in sizes for name in names])
        _check(folder, file, names, present, sizes, allow_subset)
        keys = [key_of(name) for name in table.names]
        rows = Rows(names, keys, table.attributes, table.labels, table.splits, present)
        there = [name for name in sorted(names) if name in sizes]
        images = FolderImages(folder)
        info = facts_of(KIND, table.attributes, images, there)
        content = {key: bytes_of(name, sizes.get(name, 0)) for key, name in zip(keys, names, strict=True)}
        images = FolderImages(folder, info.native_size)
        info = with_own_facts(folder, info, table.attributes)
        return cls(**fields_of(rows, str(folder), images, content, info))


def _tables(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]  # macOS leaves ._labels.csv
    return sorted(file for file in files if file.suffix.lower() == ".csv" and file.is_file())


def _table(folder: Path) -> Path:
    """Return the one CSV of the folder. Raises DataError."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; shard.source must name one that holds {ImagesWithTable.expects}"
        )
    files = _tables(folder)
    if not files:
        raise DataError(f"{folder}: no .csv file is there; the folder must hold {ImagesWithTable.expects}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise DataError(
            f"{folder}: {len(files)} .csv files are there ({names}); keep the one with the attributes"
        )
    return files[0]


def _paths(file: Path, written: list[str], sizes: dict[str, int]) -> list[str]:
    """Return the path of each image. A CSV may leave out the folder or the ending if no doubt arises.

    Raises DataError if a name may be two images, or if two names are one image.
    """
    by_name: dict[str, list[str]] = {}
    for path in sizes:
        base = path.rsplit("/", 1)[-1]
        for short in {base, base.rsplit(".", 1)[0], path.rsplit(".", 1)[0]}:
            by_name.setdefault(short, []).append(path)
    name_of: dict[str, str] = {}  # path -> as written
    for name in written:
        matches = [name] if name in sizes else by_name.get(name, [name])
        if len(matches) > 1:
            raise DataError(f"{file}: {name} may be {matches[0]} or {matches[1]}; write the path out")
        path = matches[0]
        if path in name_of:
            raise DataError(f"{file}: {name_of[path]} and {name} are one image, {path}; remove one row")
        name_of[path] = name
    return list(name_of)


def _has_other_format(file: Path) -> bool:
    """Return whether a file is there whose ending no reader of images knows."""
    return file.suffix.lower() not in ENDINGS and os.path.isfile(file)


def _check(
    folder: Path, file: Path, names: list[str], present: np.ndarray, sizes: dict[str, int], allow_subset: bool
) -> None:
    """Raise DataError if images lack a row, rows an image, or if an image has another format."""
    strangers = sorted(sizes.keys() - set(names))
    if strangers:
        raise DataError(
            f"{folder}: {len(strangers)} of {len(sizes)} images have no row in {file.name}, "
            f"the first is {strangers[0]}; add or remove them"
        )
    missing = int((~present).sum())
    for name, is_there in zip(names, present, strict=True):
        if not is_there and _has_other_format(folder / name):
            raise DataError(f"{folder / name}: is not JPEG, PNG or WebP; convert it, or remove its row")
    if missing and not (allow_subset and present.any()):
        first = names[int(present.argmin())]
        raise DataError(
            f"{file}: {missing} of {len(names)} images are not in {folder}, the first is {first}; "
            "complete the folder, or set shard.allow_subset=true to go on with those that are"
        )

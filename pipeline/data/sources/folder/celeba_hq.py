"""CelebA-HQ and CelebAMask-HQ: 30,000 square images of 512 or 1024 pixels with CelebA's attributes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.data.sources.base import Source
from pipeline.data.sources.celeba_annotations import refuse_html
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES, LAST_TEST, LAST_TRAIN, LAST_VAL
from pipeline.data.sources.dataset import DataSet, Rows, bytes_of, facts_of, fields_of
from pipeline.data.sources.folder.images import FolderImages, files_below
from pipeline.errors import DataError

KIND = "celeba_hq"
ATTRIBUTES_FILES = (
    "CelebAMask-HQ-attribute-anno.txt",
    "CelebA-HQ-attribute-anno.txt",
    "list_attr_celeba_hq.txt",
)
MAPPING_FILES = ("CelebA-HQ-to-CelebA-mapping.txt", "CelebA-to-CelebA-HQ-mapping.txt")
IMAGES = 30_000
_IMAGE = re.compile(r"(\d{1,6})\.(jpg|jpeg|png)", re.IGNORECASE)
_VALUES = {"-1": 0, "0": 0, "1": 1}


class CelebaHQ(DataSet):
    """The images and the file of attributes; see `base.Source`.

    The splits are those of CelebA if the mapping to its images is there; otherwise a hash makes them.
    """

    expects: ClassVar[str] = "CelebA-HQ-img/ and CelebAMask-HQ-attribute-anno.txt"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether the file of attributes is in the folder or one below."""
        return _find(folder, ATTRIBUTES_FILES) is not None

    @classmethod
    def estimate(cls, folder: Path) -> tuple[int, int]:
        """Return the numbers of images and attributes of CelebA-HQ."""
        return IMAGES, len(CELEBA_ATTRIBUTES)

    @classmethod
    def open(cls, folder: Path, allow_subset: bool = False) -> Source:
        """Read the attributes and the mapping, and list the images. Raises DataError."""
        file = _find(folder, ATTRIBUTES_FILES)
        if file is None:
            raise DataError(
                f"{folder}: no {ATTRIBUTES_FILES[0]} is there; the folder must hold {cls.expects}"
            )
        keys, labels = _attributes(file)
        place, found = _images(file.parent)
        names = [found.get(key, (f"{int(key)}.jpg", 0))[0] for key in keys]
        present = np.array([key in found for key in keys])
        _check(place, file, keys, found, present, allow_subset)
        mapping = _find(folder, MAPPING_FILES)
        splits = None if mapping is None else _official_splits(mapping, keys)
        images = FolderImages(place)
        there = [name for name, is_there in zip(names, present, strict=True) if is_there]
        info = facts_of(KIND, CELEBA_ATTRIBUTES, images, there)
        content = {key: bytes_of(*found[key]) for key in keys if key in found}
        rows = Rows(names, keys, CELEBA_ATTRIBUTES, labels, splits, present)
        return cls(**fields_of(rows, str(place), images, content, info))


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of `names` in the folder or in one directly below it."""
    if not folder.is_dir():
        return None
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name != "__MACOSX"]
    for place in (folder, *below):
        for name in names:
            if (place / name).is_file():
                return place / name
    return None


def _images(folder: Path) -> tuple[Path, dict[str, tuple[str, int]]]:
    """Return the folder with most images, and (file, bytes) of each image by its key. Masks are left out."""
    by_folder: dict[str, dict[str, tuple[str, int]]] = {}
    for path, size in files_below(folder).items():
        place, _, name = path.rpartition("/")
        match = _IMAGE.fullmatch(name)
        if match and "mask" not in place.lower():
            by_folder.setdefault(place, {})[_key(match[1])] = (name, size)
    if not by_folder:
        raise DataError(f"{folder}: holds no image; expected CelebA-HQ-img/0.jpg and so on")
    best = max(sorted(by_folder), key=lambda place: len(by_folder[place]))
    return folder / best, by_folder[best]


def _key(number: str) -> str:
    return f"{int(number):05d}"


def _lines(file: Path) -> list[str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    refuse_html(str(file), content[:512], "an annotation file")
    return content.removeprefix(b"\xef\xbb\xbf").decode("ascii", "replace").splitlines()


def _attributes(file: Path) -> tuple[list[str], np.ndarray]:
    """Return the keys and labels, uint8 [M, 40]."""
    lines = _lines(file)
    if len(lines) < 2 or lines[1].split() != list(CELEBA_ATTRIBUTES):
        raise DataError(f"{file}:2: expected CelebA's 40 attribute names in the official order")
    keys: list[str] = []
    seen: set[str] = set()
    labels: list[list[int]] = []
    for number, line in enumerate(lines[2:], 3):
        name, *words = line.split() or [""]
        match = _IMAGE.fullmatch(name)
        if not match or len(words) != len(CELEBA_ATTRIBUTES) or not set(words) <= _VALUES.keys():
            raise DataError(f"{file}:{number}: expected NUMBER.jpg and 40 values -1 or 1, got {line!r:.60}")
        if _key(match[1]) in seen:
            raise DataError(f"{file}:{number}: a second row for {name}; remove one")
        seen.add(_key(match[1]))
        keys.append(_key(match[1]))
        labels.append([_VALUES[word] for word in words])
    if lines[0].split() != [str(len(keys))]:
        raise DataError(f"{file}:1: announces {lines[0]!r:.40} rows, found {len(keys)}; download it again")
    return keys, np.array(labels, np.uint8)


def _official_splits(file: Path, keys: list[str]) -> np.ndarray:
    """Return the split that each image has in CelebA, uint8 [M]. Raises DataError."""
    split_of: dict[str, int] = {}
    for number, line in enumerate(_lines(file)[1:], 2):
        fields = line.split()
        original = _IMAGE.fullmatch(fields[-1]) if len(fields) == 3 else None
        if not original or not fields[0].isdigit() or not 1 <= int(original[1]) <= LAST_TEST:
            raise DataError(f"{file}:{number}: expected `index index NUMBER.jpg`, got {line!r:.60}")
        split_of[_key(fields[0])] = int(
            np.searchsorted([LAST_TRAIN, LAST_VAL], int(original[1]), side="left")
        )
    missing = [key for key in keys if key not in split_of]
    if missing:
        raise DataError(f"{file}: image {int(missing[0])} is not listed; take both files of one release")
    return np.array([split_of[key] for key in keys], np.uint8)


def _check(
    place: Path,
    file: Path,
    keys: list[str],
    found: dict[str, tuple[str, int]],
    present: np.ndarray,
    allow_subset: bool,
) -> None:
    strangers = sorted(found.keys() - set(keys))
    if strangers:
        raise DataError(
            f"{place}: {len(strangers)} of {len(found)} images are not in {file.name}, "
            f"the first is {found[strangers[0]][0]}; annotate or remove them"
        )
    missing = int((~present).sum())
    if missing and not allow_subset:
        first = int(keys[int(present.argmin())])
        raise DataError(
            f"{place}: {missing} of {len(keys)} annotated images are not there, the first is {first}.jpg; "
            "complete the download, or set shard.allow_subset=true to go on with those that are"
        )

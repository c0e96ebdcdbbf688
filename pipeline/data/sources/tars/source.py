"""Tars in WebDataset's layout as a source: images beside JSON, vectors or classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.data.sources.base import ImageError, Source
from pipeline.data.sources.dataset import DataSet, Rows, bytes_of, facts_of, fields_of, key_of, split_of
from pipeline.data.sources.decode import decode
from pipeline.data.sources.facts import with_own_facts
from pipeline.data.sources.tars.index import Sample, samples_of
from pipeline.data.sources.tars.labels import read_labels
from pipeline.data.sources.tars.places import (
    IN_FOLDER,
    Tar,
    find_tars,
    is_pattern,
    read_part,
    with_random_access,
)
from pipeline.errors import DataError

KIND = "webdataset"
MOST_IMAGE_BYTES = 1 << 28
_SPLIT_WORD = re.compile(r"(?:^|[-_./])(train|training|valid|validation|val|test)(?=[-_./0-9])")


@dataclass(frozen=True)
class TarImages:
    """Reads images by the name `TAR:START:LENGTH`."""

    tars: tuple[Tar, ...]
    expected: tuple[int, int] | None = None

    def read(self, name: str) -> np.ndarray:
        """Return the pixels of one image, uint8 [H, W, 3]. Raises ImageError."""
        return decode(self.read_bytes(name), self.expected)

    def read_bytes(self, name: str) -> bytes:
        """Return the file of one image. Raises ImageError, or DataError if its tar is out of reach."""
        tar, start, length = (int(part) for part in name.split(":"))
        if length > MOST_IMAGE_BYTES:
            raise ImageError(f"is larger than {MOST_IMAGE_BYTES} bytes")
        content = read_part(self.tars[tar], start, length)
        if len(content) != length:
            raise ImageError(f"has {len(content)} of {length} bytes")
        return content

    def in_tar(self, name: str) -> tuple[Path | None, int, int]:
        """Return where an image lies; see `base.InTars`."""
        number, start, length = (int(part) for part in name.split(":"))
        tar = self.tars[number]
        lies = tar.local and not tar.copy
        return Path(tar.local).absolute() if lies else None, start, length

    def where(self, name: str) -> str:
        """Return the tar and the place of one image in it, for messages."""
        tar, start, _ = name.split(":")
        return f"{self.tars[int(tar)].url}, image at byte {start}"


class Tars(DataSet):
    """The samples of one or more tars; see `base.Source`."""

    expects: ClassVar[str] = (
        "*.tar files in WebDataset's layout, or a pattern of them such as URL/{000..127}.tar"
    )

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether a tar is in the folder, or in one below it."""
        return any(next(folder.glob(pattern), None) for pattern in IN_FOLDER)

    @classmethod
    def estimate(cls, folder: Path) -> tuple[int, int]:
        """Return no estimate: only a look through the tars could tell."""
        return 0, 1

    @classmethod
    def open(cls, folder: Path, allow_subset: bool = False) -> Source:
        """Read all labels of the tars in a folder. Raises DataError."""
        return cls.open_all(str(folder), False)

    @classmethod
    def open_all(cls, place: str, allow_pipe: bool) -> Source:
        """Read all labels of the tars of a folder or a pattern. Raises DataError."""
        tars = with_random_access(find_tars(place, allow_pipe))
        found = [(number, tar, sample) for number, tar in enumerate(tars) for sample in samples_of(tar)]
        labels = read_labels([(tar, sample) for _, tar, sample in found])
        names = [f"{number}:{sample.start}:{sample.length}" for number, _, sample in found]
        keys = _keys([(tar, sample) for _, tar, sample in found])
        splits = _splits(place, tars, [number for number, _, _ in found], labels.splits)
        images = TarImages(tuple(tars))
        info = facts_of(KIND, labels.attributes, images, names)
        images = TarImages(tuple(tars), info.native_size)
        if labels.classes:
            info = replace(info, exclusive=(labels.attributes,))
        if not is_pattern(place):
            info = with_own_facts(Path(place), info, labels.attributes)
        content = {
            key: bytes_of(f"image.{sample.image.rsplit('.', 1)[-1]}", sample.length)
            for key, (_, _, sample) in zip(keys, found, strict=True)
        }
        rows = Rows(names, keys, labels.attributes, labels.values, splits, np.ones(len(names), bool))
        return cls(**fields_of(rows, place, images, content, info))


def _keys(samples: list[tuple[Tar, Sample]]) -> list[str]:
    """Return a key for each sample. If tars share keys, each gets its tar's path in front.

    The path begins below the folder that all tars share.
    """
    keys = [key_of(sample.key) for _, sample in samples]
    if len(set(keys)) == len(keys):
        return keys
    parts = {tar: tar.url.removesuffix(".tar").split("/") for tar, _ in samples}
    shared = len(os.path.commonprefix([path[:-1] for path in parts.values()]))
    keys = [key_of("-".join([*parts[tar][shared:], sample.key])) for tar, sample in samples]
    twice, count = Counter(keys).most_common(1)[0]
    if count > 1:
        tar = samples[keys.index(twice)][0]
        raise DataError(f"{tar.url}: {count} samples have the key {twice}; give each its own")
    return keys


def _splits(place: str, tars: list[Tar], numbers: list[int], named: list[int | None]) -> np.ndarray | None:
    """Return the splits that labels or the tars' names tell, uint8 [N], or None. Raises DataError.

    A tar's split is the last word `train`, `val` or `test` in its path below the common folder.
    """
    if all(split is not None for split in named):
        return np.array(named, np.uint8)
    of_tar = [_split_in(tar.url, place) for tar in tars]
    if all(split is None for split in of_tar) and all(split is None for split in named):
        return None
    for number, split in zip(numbers, named, strict=True):
        if split is None and of_tar[number] is None:
            raise DataError(
                f"{tars[number].url}: neither its name nor its labels say train, val or test, as others do; "
                "rename it"
            )
    chosen = [
        of_tar[number] if split is None else split for number, split in zip(numbers, named, strict=True)
    ]
    return np.array(chosen, np.uint8)


def _split_in(url: str, place: str) -> int | None:
    below = url.removeprefix(place).lstrip("/") if not is_pattern(place) else "/".join(url.split("/")[-2:])
    words = _SPLIT_WORD.findall(below.lower())
    return split_of(words[-1]) if words else None

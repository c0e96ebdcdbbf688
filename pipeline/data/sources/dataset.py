"""What all sources with labels of their own share: keys, order, splits, facts and digests."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.records import KEY
from pipeline.data.sources.base import SPLITS, Annotations, DatasetInfo, ImageError, ImageReader
from pipeline.data.sources.celeba_annotations import canonical_digests
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES, CELEBA_INFO
from pipeline.errors import DataError

ATTRIBUTE = re.compile(r"[A-Za-z0-9_-]{1,60}")  # names appear in requests, file names and metrics
SPLIT_WORDS = {
    "train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2,
}  # fmt: skip
SPLIT_COLUMNS = ("split", "partition", "subset")
HASHED_SHARES = (0.8, 0.1, 0.1)  # of the splits, where a data set has none
_SEED = b"split 0\n"  # of the hash that makes splits
_ILLEGAL = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class Rows:
    """The annotated images, in any order. Row i of every field is one image."""

    names: list[str]  # for the reader of images
    keys: list[str]
    attributes: tuple[str, ...]
    labels: np.ndarray  # uint8 [M, A]
    splits: np.ndarray | None  # uint8 [M]; None: the data set has none
    present: np.ndarray  # bool [M]: whether the image is there


@dataclass(frozen=True)
class DataSet:
    """The fields of `base.Source`, filled from rows."""

    info: DatasetInfo
    attributes: tuple[str, ...]
    images: ImageReader
    location: str
    names: list[str]
    keys: list[str]
    labels: np.ndarray  # uint8 [N, A]
    splits: np.ndarray  # uint8 [N]
    annotated: Annotations
    fingerprint: dict[str, str]


def fields_of(
    rows: Rows, location: str, images: ImageReader, content: dict[str, str] | str, info: DatasetInfo
) -> dict[str, Any]:
    """Return the fields of a DataSet: rows sorted by key, with splits and digests.

    `content` describes the image of each key, or is one digest of all images. Raises DataError.
    """
    rows = _sorted(location, rows)
    splits = hashed_splits(rows.keys) if rows.splits is None else rows.splits
    there = np.flatnonzero(rows.present)
    keys = [rows.keys[row] for row in there]
    _require_every_split(location, splits[there], rows.splits is None)
    if isinstance(content, dict):
        listing = "".join(f"{key}{content[key]}\n" for key in keys)
        content = hashlib.sha256(listing.encode()).hexdigest()
    return {
        "info": info,
        "attributes": rows.attributes,
        "images": images,
        "location": location,
        "names": [rows.names[row] for row in there],
        "keys": keys,
        "labels": rows.labels[there],
        "splits": splits[there],
        "annotated": Annotations(rows.labels, splits),
        "fingerprint": {**_digests(rows, splits), "images": content},
    }


def _sorted(location: str, rows: Rows) -> Rows:
    """Sort rows by key, and CelebA's attributes as it does. Raises DataError for a double key."""
    order = sorted(range(len(rows.keys)), key=rows.keys.__getitem__)
    for before, after in zip(order, order[1:], strict=False):
        if rows.keys[before] == rows.keys[after]:
            first, second = rows.names[before], rows.names[after]
            raise DataError(
                f"{location}: {first} and {second} have the same name ({rows.keys[after]}); rename one"
            )
    columns = list(range(len(rows.attributes)))
    attributes = rows.attributes
    if set(attributes) == set(CELEBA_ATTRIBUTES):
        columns = [attributes.index(name) for name in CELEBA_ATTRIBUTES]
        attributes = CELEBA_ATTRIBUTES
    return Rows(
        [rows.names[row] for row in order],
        [rows.keys[row] for row in order],
        attributes,
        np.ascontiguousarray(rows.labels[order][:, columns]),
        None if rows.splits is None else rows.splits[order],
        rows.present[order],
    )


# ---- names


def key_of(name: str) -> str:
    """Return the key of an image that is called `name`: its name without ending if that is a key.

    Otherwise illegal characters are replaced, and a hash of the whole name keeps it unique.
    """
    stem = re.sub(r"\.(jpe?g|png|webp)$", "", name, flags=re.IGNORECASE)
    if KEY.fullmatch(stem):
        return stem
    # A name that is not UTF-8 has its bytes as surrogates.
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{_ILLEGAL.sub('_', stem)[-70:]}-{digest[:12]}"


def require_attribute_names(where: str, names: list[str]) -> None:
    """Raise DataError if there is no attribute, or if one has no usable name or stands twice."""
    if not names:
        raise DataError(f"{where}: names no attribute; at least one column of 0 and 1 is needed")
    for name in names:
        if not ATTRIBUTE.fullmatch(name):
            raise DataError(
                f"{where}: attribute name {name!r:.80}, expected 1 to 60 letters, digits, '_', '-'; rename it"
            )
        if names.count(name) > 1:
            raise DataError(f"{where}: two attributes are called {name!r}; rename or remove one")


def split_of(word: str) -> int | None:
    """Return the position in SPLITS that a word or number names, or None."""
    word = word.strip().lower()
    if word in ("0", "1", "2"):
        return int(word)
    return SPLIT_WORDS.get(word)


# ---- splits, facts, digests


def hashed_splits(keys: list[str]) -> np.ndarray:
    """Return splits by a seeded hash of the key, uint8 [M]. No image moves when others are added."""
    train, val, _ = HASHED_SHARES
    splits = np.empty(len(keys), np.uint8)
    for row, key in enumerate(keys):
        share = int.from_bytes(hashlib.sha256(_SEED + key.encode()).digest()[:8], "big") / 2**64
        splits[row] = 0 if share < train else 1 if share < train + val else 2
    return splits


def _require_every_split(location: str, splits: np.ndarray, hashed: bool) -> None:
    for index, split in enumerate(SPLITS):
        if index not in splits:
            hint = "; add images, or a column 'split' of train, val and test" if hashed else ""
            raise DataError(
                f"{location}: no image of the {split} split among {len(splits)}; each split needs some{hint}"
            )


def facts_of(kind: str, attributes: tuple[str, ...], images: ImageReader, names: list[str]) -> DatasetInfo:
    """Return what is known of a data set: CelebA's facts if it has CelebA's attributes.

    The first readable image tells whether its images are CelebA's aligned ones.
    """
    if set(attributes) != set(CELEBA_ATTRIBUTES):
        return DatasetInfo(kind)
    for name in names:
        try:
            size = images.read(name).shape[:2]
        except ImageError:
            continue
        if size == CELEBA_INFO.native_size:
            return CELEBA_INFO
        break
    return replace(CELEBA_INFO, name=kind, native_size=None, crop=0)


def _digests(rows: Rows, splits: np.ndarray) -> dict[str, str]:
    """Return digests of labels and splits. CelebA's are those of its official files."""
    if rows.attributes == CELEBA_ATTRIBUTES:
        return canonical_digests(rows.keys, rows.labels, splits)
    head = json.dumps([list(rows.attributes), rows.keys]).encode()
    return {
        "attributes": hashlib.sha256(head + rows.labels.tobytes()).hexdigest(),
        "partition": hashlib.sha256(head + splits.tobytes()).hexdigest(),
    }


def bytes_of(name: str, size: int) -> str:
    """Return how the digest of images describes one: its ending and its bytes."""
    ending = Path(name).suffix.lower().replace(".jpeg", ".jpg")
    return f"{ending} {size}"

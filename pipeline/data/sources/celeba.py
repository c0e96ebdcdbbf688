"""CelebA as a source: aligned images beside 40 binary attributes and a partition into three splits."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.data.sources.base import SPLITS, Annotations, DatasetInfo
from pipeline.data.sources.celeba_annotations import (
    IMAGE_NAME,
    canonical_digests,
    official_partition,
    parse_attributes,
    parse_partition,
)
from pipeline.data.sources.celeba_files import TextFile, find_annotations, find_files, looks_like_celeba
from pipeline.data.sources.celeba_images import CelebaImages, list_images
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES, CELEBA_INFO, LAST_TEST, LAYOUT
from pipeline.errors import DataError

log = logging.getLogger("cvae.shards")


@dataclass(frozen=True)
class Celeba:
    """The images that are there, with their annotations, sorted by key; see `base.Source`."""

    expects: ClassVar[str] = LAYOUT
    info: ClassVar[DatasetInfo] = CELEBA_INFO
    attributes: ClassVar[tuple[str, ...]] = CELEBA_ATTRIBUTES

    images: CelebaImages
    names: list[str]  # of the image files, e.g. 000001.jpg
    keys: list[str]
    labels: np.ndarray  # uint8 [N, 40]
    splits: np.ndarray  # uint8 [N]
    annotated: Annotations
    fingerprint: dict[str, str]  # both annotations in their usual form, and (name, bytes) of the images

    @property
    def location(self) -> str:
        """The folder or zip of the images."""
        return str(self.images.place)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether one of CelebA's files is there."""
        return looks_like_celeba(folder)

    @classmethod
    def estimate(cls, folder: Path) -> tuple[int, int]:
        """Return the numbers of CelebA's images and attributes."""
        return LAST_TEST, len(CELEBA_ATTRIBUTES)

    @classmethod
    def open(cls, folder: Path, allow_subset: bool = False) -> Celeba:
        """Read and check the annotations and the list of images in `folder`; no image is opened.

        Raises DataError if something is missing, malformed or inconsistent.
        """
        files = find_files(folder)
        keys, annotated = _annotations(folder, files.attributes, files.partition)
        images, bytes_of = list_images(files.images)
        name_of = _names_by_key(images, bytes_of)
        present = np.array([key in name_of for key in keys])
        _check_images(images, keys, present, name_of, allow_subset)
        splits = annotated.splits[present]
        _check_splits(folder, images, splits)
        there = [key for key in keys if key in name_of]
        names = [name_of[key] for key in there]
        listing = hashlib.sha256()
        for key, name in zip(there, names, strict=True):
            ending = ".png" if name.lower().endswith(".png") else ".jpg"
            listing.update(f"{key}{ending} {bytes_of[name]}\n".encode())
        fingerprint = canonical_digests(keys, annotated.labels, annotated.splits)
        fingerprint["images"] = listing.hexdigest()
        return cls(images, names, there, annotated.labels[present], splits, annotated, fingerprint)


def read_celeba_annotations(source: Path) -> tuple[Annotations, dict[str, str]]:
    """Read the annotations alone, and their digests. Raises DataError."""
    attributes, partition = find_annotations(source)
    keys, annotated = _annotations(source, attributes, partition)
    return annotated, canonical_digests(keys, annotated.labels, annotated.splits)


def _annotations(
    source: Path, attributes_file: TextFile, partition_file: TextFile | None
) -> tuple[list[str], Annotations]:
    """Return the keys of all annotated images in sorted order, and their labels."""
    attributes = parse_attributes(str(attributes_file), attributes_file.read())
    if partition_file is None:
        missing = f"{source}: neither list_eval_partition.txt nor list_eval_partition.csv is there"
        splits = official_partition(attributes.keys, missing)
        log.warning("%s; images are split as CelebA's authors published it", missing)
        return attributes.keys, Annotations(attributes.values, splits)
    partition = parse_partition(str(partition_file), partition_file.read())
    if attributes.keys != partition.keys:
        _explain_difference(attributes_file, attributes.keys, partition_file, partition.keys)
    return attributes.keys, Annotations(attributes.values, partition.values[:, 0])


def _explain_difference(
    attributes_file: TextFile, attributes: list[str], partition_file: TextFile, partition: list[str]
) -> None:
    """Raise DataError that names the first image which only one of the files lists."""
    without_split = set(attributes) - set(partition)
    if without_split:
        raise _not_listed(partition_file, attributes_file, without_split)
    raise _not_listed(attributes_file, partition_file, set(partition) - set(attributes))


def _not_listed(file: TextFile, other: TextFile, keys: set[str]) -> DataError:
    name = Path(str(other)).name
    return DataError(
        f"{file}: {len(keys)} images of {name} are not listed, the first is {min(keys)}.jpg; "
        "take both of one release"
    )


def _names_by_key(images: CelebaImages, names: dict[str, int]) -> dict[str, str]:
    name_of: dict[str, str] = {}
    for name in names:
        match = IMAGE_NAME.fullmatch(name)
        assert match is not None  # `list_images` lists nothing else
        key = match[1]
        if key in name_of:
            raise DataError(f"{images.where(name)}: {name_of[key]} is there too; remove one of them")
        name_of[key] = name
    return name_of


def _check_images(
    images: CelebaImages, keys: list[str], present: np.ndarray, name_of: dict[str, str], allow_subset: bool
) -> None:
    unknown = name_of.keys() - set(keys)
    if unknown:
        raise DataError(
            f"{images.place}: {len(unknown)} of {len(name_of)} images have no annotation, "
            f"the first is {name_of[min(unknown)]}; annotate or remove them"
        )
    missing = len(keys) - int(present.sum())
    if missing and not allow_subset:
        first = keys[int(present.argmin())]
        raise DataError(
            f"{images.place}: {missing} of {len(keys)} annotated images are not there, the first is "
            f"{first}.jpg; complete the download, or set shard.allow_subset=true to go on with those that are"
        )


def _check_splits(source: Path, images: CelebaImages, splits: np.ndarray) -> None:
    counts = np.bincount(splits, minlength=len(SPLITS))
    for index, split in enumerate(SPLITS):
        if counts[index] == 0:
            raise DataError(
                f"{source}: no image of the {split} split (value {index}) is in {images.place}; "
                "each split needs some"
            )

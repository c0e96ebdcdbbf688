"""The interface of a data set: what the shard stage asks of it, and what later stages know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pipeline.config.schema import ShardConfig
from pipeline.errors import ConfigError

SPLITS = ("train", "val", "test")  # a sample's split is stored as a position in this tuple


class ImageError(ValueError):
    """One image cannot be used. The message goes on after the image's name, e.g. "is empty"."""


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that evaluation and reports need; the manifest carries them.

    Attributes are given by name. A name that a model does not read is ignored.
    """

    name: str
    native_size: tuple[int, int] | None = None  # (height, width) of every image; None: sizes differ
    exclusive: tuple[tuple[str, ...], ...] = ()  # groups of which an image has at most one attribute
    showcase: tuple[tuple[str, ...], ...] = ()  # combinations that reports show, however rare
    swept: tuple[str, ...] = ()  # attributes that pictures vary one at a time; empty: the first ones
    contrast: tuple[str, ...] = ()  # two attributes that colour drawings of latents; empty: the first two
    crop: int = 0  # side of the usual centred square, pixels; 0: the largest square of each image


class Annotations(NamedTuple):
    """The labels of every annotated image, whether or not the image itself is there."""

    labels: np.ndarray  # uint8 [M, A], 0 or 1
    splits: np.ndarray  # uint8 [M], positions in SPLITS


class ImageReader(Protocol):
    """Reads single images. It must be small and picklable, because every worker process gets a copy."""

    def read(self, name: str) -> np.ndarray:
        """Return the pixels of one image, uint8 [H, W, 3]. Raises ImageError if it cannot be used."""

    def where(self, name: str) -> str:
        """Return the path of one image, for messages."""


@runtime_checkable
class InTars(Protocol):
    """A reader whose images lie in tars."""

    def in_tar(self, name: str) -> tuple[Path | None, int, int]:
        """Return the tar that holds an image, its first byte there, and its length.

        The tar is None if it does not lie on a disk, or not for longer than this process.
        """


class Source(Protocol):
    """A data set that was opened and checked. Only `images` opens image files.

    Samples are sorted by key. Row i of `names`, `keys`, `labels` and `splits` describes one sample.
    """

    expects: ClassVar[str]  # what a folder of this kind holds, for messages

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether `folder` looks like this kind of data set. Opens no image."""

    @classmethod
    def estimate(cls, folder: Path) -> tuple[int, int]:
        """Return the largest likely number of samples and of attributes. Must be cheap."""

    @classmethod
    def open(cls, folder: Path, allow_subset: bool) -> Source:
        """Read and check everything but the images. Raises DataError.

        With `allow_subset`, annotations may list images that are not there.
        """

    @property
    def info(self) -> DatasetInfo:
        """The facts that go into the manifest."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the A binary attributes."""

    @property
    def images(self) -> ImageReader:
        """The reader of this data set's images."""

    @property
    def location(self) -> str:
        """The place of the images, for messages."""

    @property
    def names(self) -> list[str]:
        """The names under which `images` finds the samples."""

    @property
    def keys(self) -> list[str]:
        """The names of the samples in shards; each matches `records.KEY`."""

    @property
    def labels(self) -> np.ndarray:
        """Attributes, uint8 [N, A], 0 or 1."""

    @property
    def splits(self) -> np.ndarray:
        """Splits, uint8 [N], positions in SPLITS."""

    @property
    def annotated(self) -> Annotations:
        """The labels of all annotated images."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digests of everything that decides the shards' content, wherever the folder lies."""


def with_usual_crop(config: ShardConfig, info: DatasetInfo) -> ShardConfig:
    """Return the settings with the data set's usual crop if they name none; 0 is the largest square."""
    return replace(config, crop=config.crop or info.crop)


def require_sizes_fit(config: ShardConfig, info: DatasetInfo) -> None:
    """Raise ConfigError if the crop does not fit into the images, or if images would be enlarged."""
    crop = with_usual_crop(config, info).crop
    if info.native_size is not None and crop > min(info.native_size):
        height, width = info.native_size
        raise ConfigError(
            f"key 'shard.crop': got {crop}, expected at most {min(info.native_size)}: "
            f"the images have {width}x{height} pixels"
        )
    if not crop and info.native_size is not None and not config.allow_upsampling:
        height, width = info.native_size
        if min(height, width) < config.size:
            raise ConfigError(
                f"key 'shard.size': got {config.size}, but the images have {width}x{height} pixels: a larger "
                "size only enlarges them; lower shard.size, or set shard.allow_upsampling=true"
            )
    if 0 < crop < config.size and not config.allow_upsampling:
        raise ConfigError(
            f"key 'shard.size': got {config.size}, expected at most key 'shard.crop' = {crop}: "
            "a larger size only enlarges the images; lower shard.size, raise shard.crop, "
            "or set shard.allow_upsampling=true"
        )

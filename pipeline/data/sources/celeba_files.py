"""Find CelebA's files under a folder.

It may have the official layout, or the one that Google Drive, Kaggle or torchvision makes of it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.sources.celeba_images import open_zip
from pipeline.data.sources.celeba_names import ATTRIBUTES_FILES, IMAGE_PLACES, LAYOUT, PARTITION_FILES
from pipeline.errors import DataError

MAX_DEPTH = 3  # folders below the source in which files are looked for
MAX_TEXT_BYTES = 1 << 28


@dataclass(frozen=True)
class TextFile:
    """An annotation file, on disk or in a zip."""

    path: Path  # of the file, or of the zip
    member: str = ""  # name within the zip

    def __str__(self) -> str:
        return str(self.path / self.member) if self.member else str(self.path)

    def read(self) -> bytes:
        """Return the content. Raises DataError."""
        try:
            if not self.member:
                return self.path.read_bytes()
            with open_zip(self.path).open(self.member) as member:
                content = member.read(MAX_TEXT_BYTES + 1)
        except OSError as error:
            raise DataError(f"{self}: cannot be read ({error.strerror})") from None
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            raise DataError(f"{self}: cannot be unpacked ({error}); download it again") from None
        if len(content) > MAX_TEXT_BYTES:
            raise DataError(f"{self}: is larger than {MAX_TEXT_BYTES} bytes")
        return content


@dataclass(frozen=True)
class CelebaFiles:
    """The places of the parts of a data set."""

    images: Path  # folder or zip
    attributes: TextFile
    partition: TextFile | None


def looks_like_celeba(source: Path) -> bool:
    """Return whether any of CelebA's files is under `source`."""
    if not source.is_dir():
        return False
    names = {*ATTRIBUTES_FILES, *PARTITION_FILES, *IMAGE_PLACES}
    if any(path.name in names for path, _ in walk(source)):
        return True
    return _whole_archive(source) is not None


def find_images(source: Path) -> Path:
    """Return the folder or zip of images. Raises DataError."""
    images = _nearest(source, IMAGE_PLACES)
    if images is None:
        raise _missing(source, "img_align_celeba nor img_align_celeba.zip")
    return images


def find_annotations(source: Path) -> tuple[TextFile, TextFile | None]:
    """Return the file of attributes, and that of the partition if there is one. Raises DataError."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; shard.source must name one that holds {LAYOUT}")
    attributes = _nearest(source, ATTRIBUTES_FILES)
    if attributes is None:
        raise _missing(source, " nor ".join(ATTRIBUTES_FILES))
    partition = _nearest(source, PARTITION_FILES)
    return TextFile(attributes), None if partition is None else TextFile(partition)


def find_files(source: Path) -> CelebaFiles:
    """Find all parts under `source`: in folders, or in the one archive that Kaggle offers.

    Raises DataError if the images or the attributes are not there.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; shard.source must name one that holds {LAYOUT}")
    archive = _whole_archive(source)
    if archive is not None:
        return _in_archive(archive)
    images = find_images(source)
    attributes, partition = find_annotations(source)
    return CelebaFiles(images, attributes, partition)


def _missing(source: Path, names: str) -> DataError:
    packed = sorted(path.name for path, _ in walk(source) if path.suffix in (".7z", ".rar", ".001"))
    hint = f"; unpack {packed[0]}" if packed else ""
    return DataError(f"{source}: neither {names} is there; the folder must hold {LAYOUT}{hint}")


# ---- on disk


def walk(source: Path) -> Iterator[tuple[Path, int]]:
    """Yield (path, depth) of everything near `source`, near first; never looks into a folder of images."""
    level = [source]
    for depth in range(MAX_DEPTH):
        below: list[Path] = []
        for folder in level:
            for entry in _entries(folder):
                yield folder / entry.name, depth
                is_hidden = entry.name.startswith(".") or entry.name == "__MACOSX"
                if entry.is_dir() and not is_hidden and entry.name not in IMAGE_PLACES:
                    below.append(folder / entry.name)
        level = below


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []  # a folder that may not be read is none of ours


def _nearest(source: Path, names: tuple[str, ...]) -> Path | None:
    """Return the path of the least depth that has one of `names`, the earlier name first.

    Raises DataError if two of one name lie equally near.
    """
    found = [(depth, names.index(path.name), path) for path, depth in walk(source) if path.name in names]
    if not found:
        return None
    found.sort()
    best = found[0]
    rivals = [path for depth, rank, path in found if (depth, rank) == best[:2]]
    if len(rivals) > 1:
        raise DataError(
            f"{source}: both {rivals[0]} and {rivals[1]} are there; set shard.source to one of their folders"
        )
    return best[2]


# ---- in one archive


def _whole_archive(source: Path) -> Path | None:
    """Return the zip that holds the annotations too, if they are not beside it."""
    if _nearest(source, ATTRIBUTES_FILES) is not None:
        return None
    for entry in _entries(source):
        path = source / entry.name
        if path.suffix == ".zip" and _members(path, ATTRIBUTES_FILES):
            return path
    return None


def _members(archive: Path, names: tuple[str, ...]) -> list[str]:
    """Return the members of an archive that have one of `names`, in that order of names."""
    try:
        listed = open_zip(archive).namelist()
    except (DataError, OSError):
        return []  # the reader of images says what is wrong with it
    members = [name for name in listed if PurePosixPath(name).name in names and "__MACOSX" not in name]
    return sorted(members, key=lambda name: (names.index(PurePosixPath(name).name), name))


def _in_archive(archive: Path) -> CelebaFiles:
    attributes = _members(archive, ATTRIBUTES_FILES)
    partition = _members(archive, PARTITION_FILES)
    return CelebaFiles(
        archive,
        TextFile(archive, attributes[0]),
        TextFile(archive, partition[0]) if partition else None,
    )

"""Parquet files as Hugging Face writes them: image bytes beside columns of attributes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pipeline.data.sources.base import ImageError, Source
from pipeline.data.sources.dataset import (
    SPLIT_COLUMNS,
    DataSet,
    Rows,
    facts_of,
    fields_of,
    key_of,
    require_attribute_names,
    split_of,
)
from pipeline.data.sources.decode import decode
from pipeline.data.sources.facts import with_own_facts
from pipeline.data.sources.optional import needed
from pipeline.errors import DataError

KIND = "parquet"
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_bytes")
NAME_COLUMNS = ("file_name", "image_id", "name", "key")
IGNORED_COLUMNS = ("celeb_id", "identity")  # the person in CelebA's exports; no attribute
_SPLIT_WORD = re.compile(r"^(train|validation|valid|val|test)(?=$|[-_.])")
GROUPS_KEPT = 2  # row groups of images in memory; samples are read in order


class _Form(NamedTuple):
    """How the columns of a file are used."""

    image: str
    is_struct: bool  # {bytes, path}, or the bytes alone
    name: str | None
    split: str | None
    attributes: tuple[str, ...]
    columns: frozenset[str]  # all of them


@dataclass(frozen=True)
class ParquetImages:
    """Reads images by the name `FILE:ROW GROUP:ROW`."""

    folder: Path
    column: str
    is_struct: bool
    expected: tuple[int, int] | None = None

    def read(self, name: str) -> np.ndarray:
        """Return the pixels of one image, uint8 [H, W, 3]. Raises ImageError."""
        return decode(self.read_bytes(name), self.expected)

    def read_bytes(self, name: str) -> bytes:
        """Return the file of one image. Raises ImageError if it cannot be read."""
        file, group, row = name.rsplit(":", 2)
        try:
            images = _images_of(str(self.folder / file), self.column, int(group))
            value = images[int(row)].as_py()
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot be read ({' '.join(str(error).split())[:120]})") from None
        content = value["bytes"] if self.is_struct and value is not None else value
        if content is None:
            raise ImageError("has no bytes in this row")
        return bytes(content)

    def where(self, name: str) -> str:
        """Return the file, row group and row of one image, for messages."""
        file, group, row = name.rsplit(":", 2)
        return f"{self.folder / file}, row group {group}, row {row}"


class Parquet(DataSet):
    """One or more parquet files in a folder; see `base.Source`."""

    expects: ClassVar[str] = "*.parquet files with a column `image` and binary columns"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether a parquet file is in the folder, or in `data` below it."""
        return bool(_files(folder))

    @classmethod
    def estimate(cls, folder: Path) -> tuple[int, int]:
        """Return the numbers of rows and of columns without the image, from the files' footers."""
        files = [_open(file) for file in _files(folder)]
        if not files:
            return 0, 1
        return sum(file.metadata.num_rows for file in files), max(1, len(files[0].schema_arrow) - 1)

    @classmethod
    def open(cls, folder: Path, allow_subset: bool = False) -> Source:
        """Read every column but the images. Raises DataError."""
        files = _files(folder)
        if not files:
            raise DataError(f"{folder}: no .parquet file is there; the folder must hold {cls.expects}")
        form = _form(files[0])
        parts = [_read(folder, file, form) for file in files]
        names = [name for part in parts for name in part.names]
        keys = [key for part in parts for key in part.keys]
        labels = np.concatenate([part.labels for part in parts])
        splits = _joined_splits(folder, files, [part.splits for part in parts])
        rows = Rows(names, keys, form.attributes, labels, splits, np.ones(len(names), bool))
        images = ParquetImages(folder, form.image, form.is_struct)
        info = facts_of(KIND, form.attributes, images, names)
        images = ParquetImages(folder, form.image, form.is_struct, info.native_size)
        content = hashlib.sha256("".join(_footer_digest(file) for file in files).encode()).hexdigest()
        info = with_own_facts(folder, info, form.attributes)
        return cls(**fields_of(rows, str(folder), images, content, info))


def _files(folder: Path) -> list[Path]:
    """Return the parquet files in the folder, else those in `data` below it, where Hugging Face puts them."""
    for place in (folder, folder / "data"):
        found = sorted(place.glob("[!.]*.parquet")) if place.is_dir() else []
        if found:
            return found
    return []


def _open(file: Path) -> Any:
    parquet = needed("pyarrow.parquet", "parquet", f"{file}: reading it")
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: is no complete parquet file ({' '.join(str(error).split())[:120]}); download it again"
        ) from None


def _footer_digest(file: Path) -> str:
    """Return a line with a file's size and the sha256 of its footer, which lists the place of every value."""
    with file.open("rb") as stream:
        stream.seek(-8, 2)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, 2)
        return f"{file.name} {file.stat().st_size} {hashlib.sha256(stream.read(length)).hexdigest()}\n"


# ---- columns


def _form(file: Path) -> _Form:
    """Return how the columns are used. Raises DataError if there is no image, or a column is not binary."""
    import pyarrow as arrow

    schema = _open(file).schema_arrow
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise DataError(
            f"{file}: has no column of images among {', '.join(schema.names[:10])}; "
            f"expected one called {', '.join(IMAGE_COLUMNS)}"
        )
    kind = schema.field(image).type
    is_struct = arrow.types.is_struct(kind)
    if is_struct and kind.get_field_index("bytes") < 0:
        raise DataError(f"{file}: column {image} has no field `bytes`: the images are not in the file")
    if not is_struct and not (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
        raise DataError(
            f"{file}: column {image} holds {kind}, expected bytes, or a struct with a field `bytes`"
        )
    name = next((name for name in NAME_COLUMNS if name in schema.names), None)
    split = next((name for name in SPLIT_COLUMNS if name in schema.names), None)
    taken = {image, name, split, *IGNORED_COLUMNS}
    attributes = [column for column in schema.names if column not in taken]
    for column in attributes:
        kind = schema.field(column).type
        if not (arrow.types.is_boolean(kind) or arrow.types.is_integer(kind)):
            raise DataError(
                f"{file}: column {column} holds {kind}, expected true and false, 0 and 1, or -1 and 1; "
                "make it binary, or remove it"
            )
    require_attribute_names(str(file), attributes)
    return _Form(image, is_struct, name, split, tuple(attributes), frozenset(schema.names))


class _Part(NamedTuple):
    """The rows of one file."""

    names: list[str]
    keys: list[str]
    labels: np.ndarray
    splits: np.ndarray | None


def _read(folder: Path, file: Path, form: _Form) -> _Part:
    """Read a file without its images. Raises DataError."""
    parquet = _open(file)
    below = str(file.relative_to(folder))
    wanted = [*form.attributes, *(name for name in (form.name, form.split) if name)]
    differing = sorted(form.columns ^ set(parquet.schema_arrow.names))
    if differing:
        raise DataError(f"{file}: column {differing[0]} is not in all files; all must have the same columns")
    try:
        table = parquet.read(columns=wanted)
        own = _own_names(parquet, form)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: is damaged ({' '.join(str(error).split())[:120]}); download it again"
        ) from None
    groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    names = [f"{below}:{group}:{row}" for group, rows in enumerate(groups) for row in range(rows)]
    keys = [key_of(_key_name(name, f"{file.stem}-{row:08d}")) for row, name in enumerate(own)]
    columns = [_binary(file, name, table.column(name)) for name in form.attributes]
    splits = None
    if form.split:
        splits = _splits(file, table.column(form.split).to_pylist())
    elif _SPLIT_WORD.match(file.name.lower()):
        splits = np.full(
            len(names), split_of(file.name.lower().split("-")[0].split(".")[0].split("_")[0]), np.uint8
        )
    return _Part(names, keys, np.stack(columns, 1), splits)


def _own_names(parquet: Any, form: _Form) -> list[str]:
    """Return the image's name in each row: of the column for it, else the `path` of its struct; may be ""."""
    if form.name:
        return [str(name or "") for name in parquet.read(columns=[form.name]).column(0).to_pylist()]
    if not form.is_struct or parquet.schema_arrow.field(form.image).type.get_field_index("path") < 0:
        return [""] * parquet.metadata.num_rows
    paths = parquet.read(columns=[f"{form.image}.path"]).column(0)
    return [str(value["path"] or "") for value in paths.to_pylist()]


def _key_name(own: str, otherwise: str) -> str:
    return own.rsplit("/", 1)[-1] or otherwise


def _binary(file: Path, name: str, column: Any) -> np.ndarray:
    """Return a column as uint8 of 0 and 1. Raises DataError."""
    if column.null_count:
        raise DataError(f"{file}: column {name} has {column.null_count} empty values; fill them in")
    values = column.to_numpy().astype(np.int64)
    found = set(np.unique(values).tolist())
    if not (found <= {0, 1} or found <= {-1, 1}):
        strange = min(found - {0, 1}, default=-1)
        raise DataError(
            f"{file}: column {name} holds {strange}, expected 0 and 1, or -1 and 1; "
            "make it binary, or remove it"
        )
    return (values == 1).astype(np.uint8)


def _splits(file: Path, words: list[Any]) -> np.ndarray:
    splits = []
    for row, word in enumerate(words):
        split = split_of(str(word))
        if split is None:
            raise DataError(f"{file}: row {row}: the split is {word!r:.80}, expected train, val or test")
        splits.append(split)
    return np.array(splits, np.uint8)


def _joined_splits(folder: Path, files: list[Path], parts: list[np.ndarray | None]) -> np.ndarray | None:
    """Join the splits of all files. Raises DataError if only some files have any."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    if len(known) < len(parts):
        strange = next(file for file, part in zip(files, parts, strict=True) if part is None)
        raise DataError(
            f"{strange}: its name does not begin with train, validation or test, "
            f"as others in {folder} do; rename it"
        )
    return np.concatenate(known)


@lru_cache(maxsize=GROUPS_KEPT)
def _images_of(file: str, column: str, group: int) -> Any:
    """Return the column of images of one row group, kept for the rows that follow."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=[column]).column(0).combine_chunks()

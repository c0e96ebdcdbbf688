"""A CSV of binary attributes: one row for each image, its own attribute names, and perhaps a split."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data.sources.celeba_annotations import refuse_html
from pipeline.data.sources.dataset import SPLIT_COLUMNS, require_attribute_names, split_of
from pipeline.errors import DataError

NAME_COLUMNS = ("image", "file", "file_name", "filename", "image_id", "name", "path", "")
MAX_BYTES = 1 << 30  # of the CSV
TRUE = ("1", "true")
FALSE = ("0", "-1", "false")


class Table(NamedTuple):
    """The content of the CSV, in its order."""

    names: list[str]  # of the images, as written
    attributes: tuple[str, ...]
    labels: np.ndarray  # uint8 [M, A]
    splits: np.ndarray | None  # uint8 [M]


class _Columns(NamedTuple):
    name: int
    split: int | None
    attributes: list[int]


def read_table(file: Path) -> Table:
    """Read and check a CSV. Its separator is a comma, a semicolon or a tab.

    Values are 0 and 1, -1 and 1, or true and false. Raises DataError that names the line and the column.
    """
    header, rows = _read(file)
    columns = _columns(file, header)
    names: list[str] = []
    splits: list[int] = []
    labels = np.zeros((len(rows), len(columns.attributes)), np.uint8)
    first_of: dict[str, int] = {}
    zero = minus = 0  # a line that has such a value
    for number, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"{file}:{line}: {len(row)} values, expected {len(header)}")
        name = row[columns.name].strip().replace("\\", "/").removeprefix("./")
        _check_name(file, line, name, first_of)
        names.append(name)
        words = [row[column].strip().lower() for column in columns.attributes]
        labels[number] = _values(file, line, [header[column] for column in columns.attributes], words)
        zero = line if "0" in words else zero
        minus = line if "-1" in words else minus
        if columns.split is not None:
            splits.append(_split(file, line, row[columns.split]))
    if zero and minus:
        raise DataError(f"{file}: has 0 in line {zero} and -1 in line {minus}; use one of them for `no`")
    attributes = tuple(header[column] for column in columns.attributes)
    return Table(names, attributes, labels, None if columns.split is None else np.array(splits, np.uint8))


def _read(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and (line, fields) of every row that is not empty."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    refuse_html(str(file), content[:512], "a CSV file")
    if len(content) > MAX_BYTES:
        raise DataError(f"{file}: is larger than {MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8-sig")
        first = text.split("\n", 1)[0]
        separator = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        lines = [(reader.line_num, row) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: is no CSV file in UTF-8 ({error}); save it as CSV again") from None
    if len(lines) < 2:
        raise DataError(f"{file}: has no row below its header; expected one for each image")
    header = [field.strip() for field in lines[0][1]]
    return header, lines[1:]


def _columns(file: Path, header: list[str]) -> _Columns:
    lower = [field.lower() for field in header]
    if lower[0] == "" and len(header) > 1 and lower[1] in NAME_COLUMNS:
        return _rest(file, header, lower, 1, {0})  # pandas' index comes first
    if lower[0] not in NAME_COLUMNS:
        known = ", ".join(name for name in NAME_COLUMNS if name)
        raise DataError(
            f"{file}:1: the first column is {header[0]!r:.80}, "
            f"expected the images' names in one called {known}"
        )
    return _rest(file, header, lower, 0, set())


def _rest(file: Path, header: list[str], lower: list[str], name: int, ignored: set[int]) -> _Columns:
    splits = [at for at, field in enumerate(lower) if field in SPLIT_COLUMNS]
    if len(splits) > 1:
        raise DataError(f"{file}:1: both {header[splits[0]]} and {header[splits[1]]} are there; keep one")
    taken = {name, *splits, *ignored}
    attributes = [at for at in range(len(header)) if at not in taken]
    require_attribute_names(f"{file}:1", [header[at] for at in attributes])
    return _Columns(name, splits[0] if splits else None, attributes)


def _check_name(file: Path, line: int, name: str, first_of: dict[str, int]) -> None:
    """Raise DataError for a name that is empty, leads outside, or stands twice."""
    if not name or name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise DataError(f"{file}:{line}: image name {name!r:.80}, expected a path below the folder of images")
    if name in first_of:
        raise DataError(
            f"{file}:{line}: a second row for {name} (the first is line {first_of[name]}); remove one"
        )
    first_of[name] = line


def _values(file: Path, line: int, names: list[str], words: list[str]) -> list[int]:
    values = []
    for name, word in zip(names, words, strict=True):
        if word not in TRUE and word not in FALSE:
            raise DataError(
                f"{file}:{line}: {name} is {word!r:.80}, expected 0 or 1, -1 or 1, true or false; "
                "make it binary, or remove the column"
            )
        values.append(int(word in TRUE))
    return values


def _split(file: Path, line: int, word: str) -> int:
    split = split_of(word)
    if split is None:
        raise DataError(f"{file}:{line}: the split is {word!r:.80}, expected train, val or test (or 0, 1, 2)")
    return split

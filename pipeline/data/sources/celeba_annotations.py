"""CelebA's two annotation files, as the authors publish them (.txt) or as Kaggle does (.csv).

Both forms of the same annotations give the same arrays and the same digests.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import numpy as np

from pipeline.data.records import KEY
from pipeline.data.sources.base import SPLITS
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES, LAST_TEST, LAST_TRAIN, LAST_VAL
from pipeline.errors import DataError

IMAGE_NAME = re.compile(f"({KEY.pattern})" + r"\.(jpg|jpeg|png)", re.IGNORECASE)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MINUS = b"\xff"  # stands for -1 while rows are parsed; it is never in a file, which must be ASCII
_SPLIT_VALUES = {b"0": 0, b"1": 1, b"2": 2}
_NUMBER = re.compile(r"\d{6}")


class Table(NamedTuple):
    """One annotation file: keys in sorted order and the values of each."""

    keys: list[str]
    values: np.ndarray  # uint8 [N, columns]


class _Form(NamedTuple):
    """How the rows of a file are written."""

    first: int  # position of the first row
    skipped: int  # leading fields of a row that are not data: pandas' index
    columns: tuple[str, ...]
    values: dict[bytes, int]


def parse_attributes(file: str, content: bytes) -> Table:
    """Parse an attributes' file: keys, and uint8 [N, 40] of 0 and 1. `file` is its path, for messages.

    Values are -1 and 1, or 0 and 1. Raises DataError that names the line.
    """
    lines = _lines(file, content)
    is_csv = file.endswith(".csv")
    header_at = 0 if is_csv else 1  # the official text begins with the number of rows
    header = _header(lines, header_at)
    skipped = int(is_csv and header[:1] in ([""], ["Unnamed: 0"]))
    wanted = ["image_id", *CELEBA_ATTRIBUTES] if is_csv else list(CELEBA_ATTRIBUTES)
    if header[skipped:] != wanted:
        raise DataError(
            f"{file}:{header_at + 1}: expected the header '{' '.join(wanted[:3])} ...' "
            "of 40 attribute names in the official order"
        )
    rows = lines[header_at + 1 :]
    signed = any(b"-" in row for row in rows)
    values = {b"-1": 0, b"1": 1} if signed else {b"0": 0, b"1": 1}
    table = _parse(file, lines, _Form(header_at + 1, skipped, CELEBA_ATTRIBUTES, values))
    if not is_csv and lines[0].split() != [str(len(table.keys)).encode()]:
        announced = lines[0].decode("ascii", "replace").strip()
        raise DataError(f"{file}:1: announces {announced!r} rows, found {len(table.keys)}; download it again")
    return _sorted(table)


def parse_partition(file: str, content: bytes) -> Table:
    """Parse a partition file: keys, and uint8 [N, 1] of 0 (train), 1 (val) and 2 (test).

    Raises DataError that names the line.
    """
    lines = _lines(file, content)
    first = 0
    skipped = 0
    if file.endswith(".csv"):
        first = 1
        header = _header(lines, 0)
        skipped = int(header[:1] in ([""], ["Unnamed: 0"]))
        if header[skipped:] != ["image_id", "partition"]:
            raise DataError(f"{file}:1: expected the header 'image_id,partition'")
    return _sorted(_parse(file, lines, _Form(first, skipped, ("partition",), _SPLIT_VALUES)))


def official_partition(keys: list[str], missing: str) -> np.ndarray:
    """Return the published split of images that have their official numbers, uint8 [N].

    Raises DataError that begins with `missing` if a key is no such number, or if a split has no image.
    """
    numbers = []
    for key in keys:
        if not _NUMBER.fullmatch(key) or not 1 <= int(key) <= LAST_TEST:
            raise DataError(
                f"{missing}, and the image {key} has no number from 000001 to {LAST_TEST}, "
                "by which CelebA's published split goes; add the file"
            )
        numbers.append(int(key))
    splits = np.searchsorted([LAST_TRAIN, LAST_VAL], numbers, side="left").astype(np.uint8)
    for index, split in enumerate(SPLITS):
        if index not in splits:
            raise DataError(
                f"{missing}, and none of the images is in the {split} split "
                "as CelebA's authors published it; add the file"
            )
    return splits


def canonical_digests(keys: list[str], labels: np.ndarray, splits: np.ndarray) -> dict[str, str]:
    """Return the sha256 that both files have in their usual text form, whatever their form here.

    The usual form of all of CelebA is the file that its authors publish: lines end in CR LF, and the
    first value of a row is not padded. The usual form of fewer images is that of `toy.dataset`.
    """
    published = len(keys) == LAST_TEST
    end = b"\r\n" if published else b"\n"
    cells = np.array([list(b" -1"), list(b"  1")], np.uint8)  # of a label 0 and 1
    width = labels.shape[1] * cells.shape[1]
    rows = cells[labels].tobytes()
    attributes = hashlib.sha256(f"{len(keys)}".encode() + end)
    attributes.update(" ".join(CELEBA_ATTRIBUTES).encode() + b" " + end)
    partition = hashlib.sha256()
    for i, (key, split) in enumerate(zip(keys, splits.tolist(), strict=True)):
        row = rows[i * width : (i + 1) * width]
        if published:
            row = b" " + row.lstrip()
        attributes.update(f"{key}.jpg".encode() + row + end)
        partition.update(f"{key}.jpg {split}".encode() + end)
    return {"attributes": attributes.hexdigest(), "partition": partition.hexdigest()}


# ---- rows


def refuse_html(file: str, start: bytes, wanted: str) -> None:
    """Raise DataError if a file begins like an HTML page."""
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(
            f"{file}: is an HTML page, not {wanted} (a download page was saved instead); download it again"
        )


def _lines(file: str, content: bytes) -> list[bytes]:
    refuse_html(file, content[:512], "an annotation file")
    text = content.removeprefix(_BYTE_ORDER_MARK)
    if not text.isascii():
        raise DataError(f"{file}: is not plain ASCII text, as CelebA's annotations are; download it again")
    if file.endswith(".csv"):
        text = text.replace(b'"', b"")
    return text.rstrip().split(b"\n")


def _header(lines: list[bytes], at: int) -> list[str]:
    """Return the fields of a header; a first field may be empty in a .csv."""
    if at >= len(lines):
        return []
    line = lines[at].decode().strip()
    if "," not in line:
        return line.split()
    return [field.strip() for field in line.split(",")]


def _fields(line: bytes) -> list[bytes]:
    return line.replace(b",", b" ").split()


def _parse(file: str, lines: list[bytes], form: _Form) -> Table:
    """Parse the rows `name value ...`; blanks and commas separate."""
    width = len(form.columns)
    names: list[str] = []
    texts: list[bytes] = []
    for line in lines[form.first :]:
        name, *fields = _fields(line)[form.skipped :] or [b""]
        text = b"".join(fields).replace(b"-1", _MINUS)  # one byte per value if all are valid
        if len(fields) != width or len(text) != width:
            raise _bad_row(file, form.first + len(names), form, [name, *fields])
        names.append(name.decode())
        texts.append(text)
    code_of = np.full(256, 255, np.uint8)
    for value, code in form.values.items():
        code_of[value.replace(b"-1", _MINUS)[0]] = code
    parsed = code_of[np.frombuffer(b"".join(texts), np.uint8)].reshape(len(names), width)
    bad = np.flatnonzero((parsed == 255).any(axis=1))
    if len(bad):
        at = form.first + int(bad[0])
        raise _bad_row(file, at, form, _fields(lines[at])[form.skipped :])
    return Table(_keys(file, names, form.first), parsed)


def _bad_row(file: str, at: int, form: _Form, row: list[bytes]) -> DataError:
    name, *fields = row
    where = f"{file}:{at + 1}: {name.decode('ascii', 'replace') or 'an empty row'}"
    if len(fields) != len(form.columns):
        wanted = len(form.columns)
        return DataError(f"{where}: {len(fields)} values, expected {wanted}; download the file again")
    allowed = ", ".join(value.decode() for value in form.values)
    for column, field in zip(form.columns, fields, strict=True):
        if field not in form.values:
            found = field.decode("ascii", "replace")
            return DataError(f"{where}: {column} is {found!r}, expected one of {allowed}")
    raise AssertionError("every field of this row is valid")


def _keys(file: str, names: list[str], first: int) -> list[str]:
    """Return the names without their ending. Raises DataError for a strange or a repeated name."""
    keys: list[str] = []
    seen: set[str] = set()
    for line, name in enumerate(names, first + 1):
        match = IMAGE_NAME.fullmatch(name)
        if not match:
            raise DataError(
                f"{file}:{line}: image name {name!r}, "
                "expected 1 to 90 letters, digits, '_' or '-', then .jpg or .png"
            )
        key = match[1]
        if key in seen:
            raise DataError(f"{file}:{line}: a second row for {name}; remove one")
        seen.add(key)
        keys.append(key)
    return keys


def _sorted(table: Table) -> Table:
    order = np.argsort(np.array(table.keys))
    return Table([table.keys[i] for i in order], table.values[order])

"""CelebA's official layout: a folder or a zip of aligned JPEGs beside two annotation files (.txt, or Kaggle's .csv)."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.data.records import KEY
from pipeline.errors import DataError

CELEBA_ATTRIBUTES: tuple[str, ...] = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose", "Black_Hair",
    "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair",
    "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face",
    "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair",
    "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
)  # fmt: skip
SPLITS = ("train", "val", "test")  # partition 0, 1, 2
LAYOUT = "img_align_celeba/ or img_align_celeba.zip, list_attr_celeba.txt (or .csv) and list_eval_partition.txt (or .csv)"
MAX_JPEG_BYTES = 1 << 22  # an aligned image has about 7 kB
_FOLDER = "img_align_celeba"
_MINUS = b"\xff"  # stands for -1 while rows are parsed; never in a file, which must be ASCII
_IMAGE = re.compile(KEY.pattern + r"\.jpg")


@dataclass(frozen=True)
class Celeba:
    """The images that are there, with their annotations, sorted by name."""

    images: Path  # img_align_celeba/ or img_align_celeba.zip; see `read_image`
    names: list[str]  # e.g. 000001.jpg
    attributes: np.ndarray  # uint8 [N, 40], 0 or 1
    partition: np.ndarray  # uint8 [N], index into SPLITS
    annotated: int  # images that the annotations list
    digests: dict[str, str]  # sha256 of the two annotations and of the list of (name, bytes) of the images


def read_celeba(source: Path, allow_subset: bool = False) -> Celeba:
    """Read and check annotations and the list of images in `source`; no image is opened.

    Raises DataError where something is missing, malformed or inconsistent. `allow_subset` accepts annotations without an image.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; shard.source must name one that holds {LAYOUT}")
    images = _find(source, (_FOLDER, f"{_FOLDER}.zip"))
    if (images / _FOLDER).is_dir():  # Kaggle's archive unpacks to a folder within the folder
        images /= _FOLDER
    names, attributes, partition, digests = read_annotations(source)
    bytes_of = list_images(images)
    present = np.array([name in bytes_of for name in names])
    _check_images(images, names, present, bytes_of, allow_subset)
    counts = np.bincount(partition[present], minlength=len(SPLITS))
    for index, split in enumerate(SPLITS):
        if counts[index] == 0:
            raise DataError(
                f"{source}: no image of the {split} split (value {index}) is in {images}; each split needs some"
            )
    names = [name for name, there in zip(names, present.tolist(), strict=True) if there]
    listing = "".join(f"{name} {bytes_of[name]}\n" for name in names)
    digests["images"] = hashlib.sha256(listing.encode()).hexdigest()
    return Celeba(images, names, attributes[present], partition[present], len(present), digests)


def _find(source: Path, choices: tuple[str, str]) -> Path:
    for choice in choices:
        if (source / choice).exists():
            return source / choice
    raise DataError(
        f"{source}: neither {choices[0]} nor {choices[1]} is there; the folder must hold {LAYOUT}"
    )


def _explain_difference(file: Path, names: list[str], other: Path, other_names: list[str]) -> None:
    for here, there, missing in (
        (file, other, set(names) - set(other_names)),
        (other, file, set(other_names) - set(names)),
    ):
        if missing:
            raise DataError(
                f"{there}: {len(missing)} images of {here.name} are not listed, the first is {min(missing)}; take both of one release"
            )


def _check_images(
    images: Path, names: list[str], present: np.ndarray, bytes_of: dict[str, int], allow_subset: bool
) -> None:
    unknown = bytes_of.keys() - set(names)
    if unknown:
        raise DataError(
            f"{images}: {len(unknown)} of {len(bytes_of)} images have no annotation, the first is {min(unknown)}; annotate or remove them"
        )
    missing = len(names) - int(present.sum())
    if missing and not allow_subset:
        raise DataError(
            f"{images}: {missing} of {len(names)} annotated images are not there, the first is {names[int(present.argmin())]}; "
            "complete the download, or set shard.allow_subset=true to go on with those that are"
        )


# ---- annotations


def read_annotations(source: Path) -> tuple[list[str], np.ndarray, np.ndarray, dict[str, str]]:
    """Names in sorted order, attributes uint8 [N, 40], partition uint8 [N] of every annotated image, and the digests of both files."""
    attributes_file = _find(source, ("list_attr_celeba.txt", "list_attr_celeba.csv"))
    partition_file = _find(source, ("list_eval_partition.txt", "list_eval_partition.csv"))
    names, attributes, attributes_sha256 = read_attributes(attributes_file)
    partition_names, partition, partition_sha256 = read_partition(partition_file)
    if names != partition_names:
        _explain_difference(attributes_file, names, partition_file, partition_names)
    return names, attributes, partition, {"attributes": attributes_sha256, "partition": partition_sha256}


def read_attributes(file: Path) -> tuple[list[str], np.ndarray, str]:
    """Names in sorted order, uint8 [N, 40] of 0 and 1 (from -1 and 1), and the file's sha256."""
    lines, sha256 = _read_lines(file)
    names_at = 0 if file.suffix == ".csv" else 1  # the official text begins with the number of rows
    header = lines[names_at].replace(b",", b" ").split() if len(lines) > names_at else []
    expected = (["image_id"] if file.suffix == ".csv" else []) + list(CELEBA_ATTRIBUTES)
    if [name.decode() for name in header] != expected:
        raise DataError(
            f"{file}:{names_at + 1}: expected the header '{' '.join(expected[:3])} ...' of 40 attribute names in the official order"
        )
    names, values = _parse(file, lines, names_at + 1, CELEBA_ATTRIBUTES, {b"-1": 0, b"1": 1})
    if names_at and lines[0].split() != [str(len(names)).encode()]:
        raise DataError(
            f"{file}:1: announces {lines[0].decode('ascii', 'replace').strip()!r} rows, found {len(names)}; download it again"
        )
    order = np.argsort(np.array(names))
    return [names[i] for i in order], values[order], sha256


def read_partition(file: Path) -> tuple[list[str], np.ndarray, str]:
    """Names in sorted order, uint8 [N] of 0 (train), 1 (val), 2 (test), and the file's sha256."""
    lines, sha256 = _read_lines(file)
    names, values = _parse(
        file, lines, 1 if file.suffix == ".csv" else 0, ("partition",), {b"0": 0, b"1": 1, b"2": 2}
    )
    order = np.argsort(np.array(names))
    return [names[i] for i in order], values[order, 0], sha256


def _read_lines(file: Path) -> tuple[list[bytes], str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    _refuse_html(file, content[:512], "an annotation file")
    text = content.removeprefix(b"\xef\xbb\xbf")
    if not text.isascii():
        raise DataError(f"{file}: is not plain ASCII text, as CelebA's annotations are; download it again")
    return text.rstrip().split(b"\n"), hashlib.sha256(content).hexdigest()


def _refuse_html(file: Path, start: bytes, wanted: str) -> None:
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(
            f"{file}: is an HTML page, not {wanted} (a download page was saved instead); download it again"
        )


def _parse(
    file: Path, lines: list[bytes], first: int, columns: tuple[str, ...], values: dict[bytes, int]
) -> tuple[list[str], np.ndarray]:
    """Rows `name value ...` from line `first` (0-based) on -> names and uint8 [N, columns]; blanks and commas separate."""
    names: list[str] = []
    texts: list[bytes] = []
    for line in lines[first:]:
        name, *fields = line.replace(b",", b" ").split() or [b""]
        text = b"".join(fields).replace(b"-1", _MINUS)  # one byte per value where all are valid
        if len(fields) != len(columns) or len(text) != len(columns):
            raise _bad_row(file, first + len(names), name, fields, columns, values)
        names.append(name.decode())
        texts.append(text)
    table = np.full(256, 255, np.uint8)
    for value, code in values.items():
        table[value.replace(b"-1", _MINUS)[0]] = code
    parsed = table[np.frombuffer(b"".join(texts), np.uint8)].reshape(len(names), len(columns))
    bad = np.flatnonzero((parsed == 255).any(axis=1))
    if len(bad):
        line = lines[first + bad[0]].replace(b",", b" ").split()
        raise _bad_row(file, first + int(bad[0]), line[0], line[1:], columns, values)
    _check_names(file, names, first)
    return names, parsed


def _bad_row(
    file: Path,
    line: int,
    name: bytes,
    fields: list[bytes],
    columns: tuple[str, ...],
    values: dict[bytes, int],
) -> DataError:
    where = f"{file}:{line + 1}: {name.decode('ascii', 'replace') or 'an empty row'}"
    if len(fields) != len(columns):
        return DataError(f"{where}: {len(fields)} values, expected {len(columns)}; download the file again")
    column, field = next((c, f) for c, f in zip(columns, fields, strict=True) if f not in values)
    wanted = ", ".join(value.decode() for value in values)
    return DataError(f"{where}: {column} is {field.decode('ascii', 'replace')!r}, expected one of {wanted}")


def _check_names(file: Path, names: list[str], first: int) -> None:
    seen: set[str] = set()
    for line, name in enumerate(names, first + 1):
        if not _IMAGE.fullmatch(name):
            raise DataError(
                f"{file}:{line}: image name {name!r}, expected 1 to 90 letters, digits, '_' or '-', then .jpg"
            )
        if name in seen:
            raise DataError(f"{file}:{line}: a second row for {name}; remove one")
        seen.add(name)


# ---- images


def list_images(images: Path) -> dict[str, int]:
    """Names and sizes in bytes of the JPEGs of the folder or zip `images`; other files are left alone. Raises DataError."""
    if images.is_dir():
        with os.scandir(images) as entries:
            found = {
                entry.name: entry.stat().st_size
                for entry in entries
                if _IMAGE.fullmatch(entry.name) and entry.is_file()
            }
    else:
        _archive.cache_clear()  # the file may have been replaced
        prefix = f"{_FOLDER}/"
        members = (
            (info.filename.removeprefix(prefix), info)
            for info in _archive(images).infolist()
            if info.filename.startswith(prefix)
        )
        found = {name: info.file_size for name, info in members if _IMAGE.fullmatch(name)}
    if not found:
        raise DataError(f"{images}: holds no image; expected {_FOLDER}/000001.jpg and so on")
    return found


def read_image(images: Path, name: str) -> bytes:
    """The JPEG `name` of the folder or zip `images`; ValueError or OSError says why it cannot be read."""
    if images.is_dir():
        with (images / name).open("rb") as file:
            content = file.read(MAX_JPEG_BYTES + 1)
    else:
        try:
            with _archive(images).open(f"{_FOLDER}/{name}") as member:
                content = member.read(MAX_JPEG_BYTES + 1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            KeyError,
            RuntimeError,
        ) as error:  # RuntimeError: encrypted, unknown method
            raise ValueError(f"cannot be unpacked ({error})") from None
    if len(content) > MAX_JPEG_BYTES:
        raise ValueError(f"is larger than {MAX_JPEG_BYTES} bytes")
    return content


@lru_cache(maxsize=1)
def _archive(file: Path) -> zipfile.ZipFile:
    """The open zip, once per process."""
    with file.open("rb") as start:
        _refuse_html(file, start.read(512), "a zip archive")
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        size = file.stat().st_size
        raise DataError(
            f"{file}: is no complete zip archive ({error}; {size} bytes); the download was cut short: download it again"
        ) from None

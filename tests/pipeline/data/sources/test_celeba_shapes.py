"""CelebA as people have it: every shape of the same images is read as the official layout is."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.registry import recognise
from pipeline.errors import DataError
from tests.celeba_source import make_source

IMAGES = "img_align_celeba"


def pack(source: Path, archive: str, prefix: str, *extra: str) -> None:
    """Move the images into a zip under `prefix`, with macOS's leftovers; `extra` files go in too."""
    with zipfile.ZipFile(source / archive, "w") as zipped:
        for image in (source / IMAGES).iterdir():
            zipped.write(image, prefix + image.name)
            zipped.writestr(f"__MACOSX/{prefix}._{image.name}", b"Mac OS X")
        for name in extra:
            zipped.write(source / name, name)
            (source / name).unlink()
    shutil.rmtree(source / IMAGES)


def nest(source: Path) -> None:
    (source / IMAGES).rename(source / "inner")
    (source / IMAGES).mkdir()
    (source / "inner").rename(source / IMAGES / IMAGES)
    (source / "list_bbox_celeba.csv").write_text("image_id,x_1\n000001.jpg,95\n")
    (source / "list_landmarks_align_celeba.csv").write_text("image_id,lefteye_x\n000001.jpg,69\n")


def drive(source: Path) -> None:
    for folder in ("Anno", "Eval", "Img"):
        (source / folder).mkdir()
    for file in source.glob("list_attr*"):
        file.rename(source / "Anno" / file.name)
    for file in source.glob("list_eval*"):
        file.rename(source / "Eval" / file.name)
    (source / IMAGES).rename(source / "Img" / IMAGES)


def torchvision(source: Path) -> None:
    parts = list(source.iterdir())
    (source / "celeba").mkdir()
    for part in parts:
        part.rename(source / "celeba" / part.name)


def upper(source: Path) -> None:
    for image in list((source / IMAGES).iterdir()):
        image.rename(image.with_suffix(".JPG"))


def macos(source: Path) -> None:
    (source / "__MACOSX" / IMAGES).mkdir(parents=True)
    (source / "__MACOSX" / "list_attr_celeba.txt").write_bytes(b"Mac OS X")
    (source / IMAGES / "._000001.jpg").write_bytes(b"Mac OS X")


def rewrite(change: Callable[[bytes], bytes], suffix: str) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        for file in source.glob(f"list_*.{suffix}"):
            file.write_bytes(change(file.read_bytes()))

    return apply


def quoted(content: bytes) -> bytes:
    lines = content.decode().splitlines()
    return "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in lines).encode()


def with_index(content: bytes) -> bytes:
    head, *rows = content.decode().splitlines()
    return "\n".join(["," + head, *(f"{i},{row}" for i, row in enumerate(rows))]).encode()


TXT: dict[str, Callable[[Path], None]] = {
    "zip": lambda s: pack(s, "img_align_celeba.zip", f"{IMAGES}/"),
    "zip, nested": lambda s: pack(s, "img_align_celeba.zip", f"{IMAGES}/{IMAGES}/"),
    "zip without a folder": lambda s: pack(s, "img_align_celeba.zip", ""),
    "zip with ./": lambda s: pack(s, "img_align_celeba.zip", f"./{IMAGES}/"),
    "nested": nest,
    "Google Drive": drive,
    "torchvision": torchvision,
    "upper case": upper,
    "macOS": macos,
    "CRLF": rewrite(lambda text: text.replace(b"\n", b"\r\n"), "txt"),
    "0 and 1": rewrite(lambda text: text.replace(b"-1", b" 0"), "txt"),
}
CSV: dict[str, Callable[[Path], None]] = {
    "csv": lambda s: None,
    "csv, nested": nest,
    "archive.zip": lambda s: pack(
        s, "archive.zip", f"{IMAGES}/{IMAGES}/", "list_attr_celeba.csv", "list_eval_partition.csv"
    ),
    "csv with BOM": rewrite(lambda text: b"\xef\xbb\xbf" + text, "csv"),
    "csv, CRLF": rewrite(lambda text: text.replace(b"\n", b"\r\n"), "csv"),
    "csv of 0 and 1": rewrite(lambda text: text.replace(b"-1", b"0"), "csv"),
    "csv with quotes": rewrite(quoted, "csv"),
    "csv with pandas' index": rewrite(with_index, "csv"),
}


@pytest.mark.parametrize("shape", [*TXT, *CSV])
def test_every_shape_reads_as_the_official_layout(tmp_path: Path, shape: str) -> None:
    official = Celeba.open(make_source(tmp_path / "official"))
    source = make_source(tmp_path / "other", csv=shape in CSV)
    (TXT | CSV)[shape](source)
    assert recognise(source) is Celeba
    found = Celeba.open(source)
    assert (found.keys, found.fingerprint) == (official.keys, official.fingerprint)
    np.testing.assert_array_equal(found.labels, official.labels)
    np.testing.assert_array_equal(found.splits, official.splits)
    for name, wanted in zip(found.names, official.names, strict=True):
        np.testing.assert_array_equal(found.images.read(name), official.images.read(wanted))


def renumber(source: Path, numbers: list[int]) -> None:
    """Give the eleven images other official numbers."""
    for file in source.glob("list_*"):
        text = file.read_text()
        for i, number in enumerate(numbers, 1):
            text = text.replace(f"{i:06d}.jpg", f"{number:06d}.jpg")
        file.write_text(text)
    for i, number in enumerate(numbers, 1):
        (source / IMAGES / f"{i:06d}.jpg").rename(source / IMAGES / f"{number:06d}.jpg")


def test_without_a_partition_file_the_published_split_holds(tmp_path: Path) -> None:
    numbers = [100, 101, 102, 103, 104, 105, 162_770, 162_771, 182_637, 182_638, 202_599]
    source = make_source(tmp_path / "a", csv=True)
    renumber(source, numbers)
    with_file = Celeba.open(source)
    (source / "list_eval_partition.csv").unlink()
    without = Celeba.open(source)
    assert without.splits.tolist() == with_file.splits.tolist() == [0] * 7 + [1] * 2 + [2] * 2
    assert without.fingerprint == with_file.fingerprint


def test_two_data_sets_in_one_folder_are_not_guessed(tmp_path: Path) -> None:
    make_source(tmp_path / "all" / "a")
    make_source(tmp_path / "all" / "b")
    with pytest.raises(DataError, match=r"both .*a/list_attr_celeba.txt and .*b/list_attr.* are there"):
        Celeba.open(tmp_path / "all")


def test_an_archive_of_another_kind_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a")
    shutil.rmtree(source / IMAGES)
    (source / "img_align_celeba_png.7z").write_bytes(b"7z")
    with pytest.raises(DataError, match="neither img_align_celeba nor .*; unpack img_align_celeba_png.7z"):
        Celeba.open(source)

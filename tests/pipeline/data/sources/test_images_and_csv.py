"""Any folder of images with a CSV: every mode of file, own names, splits by hash, and what is refused."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data.sources.base import DatasetInfo, ImageError
from pipeline.data.sources.dataset import hashed_splits, key_of
from pipeline.data.sources.decode import decode
from pipeline.data.sources.facts import with_own_facts
from pipeline.data.sources.folder.source import ImagesWithTable
from pipeline.data.sources.folder.table import read_table
from pipeline.data.sources.registry import recognise
from pipeline.errors import DataError
from tests.conftest import ROOT
from tests.pipeline.data.sources.layouts import make_manifest, refusal

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).resize((70, 50))


def file_of(image: Image.Image, form: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def write(folder: Path, table: str, images: dict[str, bytes] | None = None) -> Path:
    """Write labels.csv and images; by default every name in the table gets a PNG."""
    folder.mkdir()
    (folder / "labels.csv").write_text(table)
    names = [line.split(",")[0] for line in table.splitlines()[1:] if line]
    for name, content in (images or {name: file_of(PICTURE, "PNG") for name in names}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


SOUND = "image,split,Red,Round\na.png,train,1,0\nb/b 2.png,val,0,1\nb/c.png,test,1,1\nd.png,train,0,0\n"

# ---- pixels


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "RGB", "1"])
def test_every_mode_becomes_rgb(form: str, mode: str) -> None:
    image = PICTURE.quantize(16) if mode == "P" else PICTURE.convert(mode)
    options = {"lossless": True} if form == "WEBP" else {}
    found = decode(file_of(image, form, **options))
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_transparent_pixels_lie_over_white() -> None:
    clear = PICTURE.convert("RGBA")
    clear.putalpha(0)
    assert (decode(file_of(clear, "PNG")) == 255).all()
    palette = PICTURE.quantize(16)
    first = np.asarray(palette) == 0
    found = decode(file_of(palette, "PNG", transparency=0))
    assert (found[first] == 255).all() and not (found[~first] == 255).all()


def test_sixteen_bits_of_grey_keep_their_brightness() -> None:
    levels = np.linspace(0, 65_535, 60).astype(np.uint16).reshape(6, 10)
    found = decode(file_of(Image.fromarray(levels), "PNG"))
    np.testing.assert_array_equal(found[..., 0], np.rint(levels / 257))


def test_cmyk_and_grey_jpegs() -> None:
    cmyk = PICTURE.convert("CMYK")
    found = decode(file_of(cmyk, "JPEG", quality=98))
    assert np.abs(found.astype(int) - np.asarray(cmyk.convert("RGB"))).mean() < 4
    assert decode(file_of(PICTURE.convert("L"), "JPEG")).shape == (50, 70, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_turned_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = file_of(PICTURE, form, exif=exif, **({"lossless": True} if form == "WEBP" else {"quality": 95}))
    with Image.open(io.BytesIO(stored)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = decode(stored)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_photos_with_an_odd_exif_block_are_turned_too(form: str) -> None:
    odd, turned = b"abc\0", 6
    entries = struct.pack("<HHI4s", 0x0100, 2, 4, odd) + struct.pack("<HHIHH", 0x0112, 3, 1, turned, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)  # the width is a word
    stored = file_of(PICTURE, form, exif=exif)
    with pytest.raises((struct.error, TypeError)), Image.open(io.BytesIO(stored)) as image:
        ImageOps.exif_transpose(image)
    assert decode(stored).shape == (70, 50, 3)


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_cut_files_are_refused(form: str) -> None:
    whole = file_of(PICTURE.resize((200, 200)), form)
    with pytest.raises(ImageError, match="is a damaged or truncated"):
        decode(whole[: len(whole) // 2])


# ---- labels, names, splits


def test_a_folder_with_own_names_and_splits(tmp_path: Path) -> None:
    found = ImagesWithTable.open(write(tmp_path / "data", SOUND))
    assert found.attributes == ("Red", "Round") and found.info == DatasetInfo("images+csv")
    assert found.keys == sorted(found.keys) and found.keys[0] == "a"
    by_name = dict(
        zip(found.names, zip(found.labels.tolist(), found.splits.tolist(), strict=True), strict=True)
    )
    assert by_name == {
        "a.png": ([1, 0], 0),
        "b/b 2.png": ([0, 1], 1),
        "b/c.png": ([1, 1], 2),
        "d.png": ([0, 0], 0),
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace(",0", ",-1"),
        lambda text: text.replace(",0", ",false").replace(",1", ",TRUE"),
        lambda text: text.replace("train", "0").replace("val", "1").replace("test", "2"),
        lambda text: re.sub(r"\.png", "", text),
        lambda text: "\n".join(
            f"{i}," * (i > 0) + "," * (i == 0) + line for i, line in enumerate(text.splitlines())
        ),
    ],
)
def test_every_form_of_the_table_reads_the_same(change: Callable[[str], str], tmp_path: Path) -> None:
    plain = ImagesWithTable.open(write(tmp_path / "plain", SOUND))
    folder = write(tmp_path / "data", SOUND)
    (folder / "labels.csv").write_bytes(change(SOUND).encode())
    found = ImagesWithTable.open(folder)
    assert dict(zip(found.names, found.labels.tolist(), strict=True)) == dict(
        zip(plain.names, plain.labels.tolist(), strict=True)
    )
    assert sorted(found.splits.tolist()) == sorted(plain.splits.tolist())


def test_a_hash_makes_splits_that_never_move(tmp_path: Path) -> None:
    keys = [f"image_{i}" for i in range(2000)]
    splits = hashed_splits(keys)
    assert np.abs(np.bincount(splits) / len(keys) - [0.8, 0.1, 0.1]).max() < 0.02
    np.testing.assert_array_equal(hashed_splits(keys[500:]), splits[500:])
    assert hashed_splits(["a", "b", "c", "d"]).tolist() == hashed_splits(["a", "b", "c", "d"]).tolist()


def test_strange_names_get_keys_of_their_own() -> None:
    names = ["a b.png", "a_b.png", "a/b.png", "ä.png", "x" * 200 + ".png", "a.b.png"]
    keys = [key_of(name) for name in names]
    assert len(set(keys)) == len(names) and keys[1] == "a_b"
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)


def test_mixed_sizes_are_cut_to_their_largest_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    images = {name: file_of(PICTURE.resize(size), "PNG") for name, size in (
        ("a.png", (70, 50)), ("b/b 2.png", (20, 90)), ("b/c.png", (16, 16)), ("d.png", (300, 31)),
    )}  # fmt: skip
    folder = write(tmp_path / "data", SOUND, images)
    found = make_manifest(folder, tmp_path / "runs", "shard.size=16")
    assert (found["crop"], found["size"], found["counts"]["present"]) == (0, 16, 4)
    with pytest.raises(DataError, match="c.png: is 16x16 pixels, smaller than shard.size=17"):
        make_manifest(folder, tmp_path / "runs", "shard.size=17")
    with pytest.raises(DataError, match="is .* pixels, smaller than shard.crop=40"):
        make_manifest(folder, tmp_path / "runs", "shard.crop=40", "shard.size=16")


# ---- what is refused

BROKEN: dict[str, tuple[str, str]] = {
    "no name column": ("picture,Red\na.png,1\n", "labels.csv:1: the first column is 'picture', expected"),
    "no attribute": ("image,split\na.png,train\n", "labels.csv:1: names no attribute"),
    "twice": ("image,Red,Red\na.png,1,1\n", "two attributes are called 'Red'"),
    "name": ("image,Bright Red\na.png,1\n", "attribute name 'Bright Red', expected"),
    "value": (SOUND.replace("val,0", "val,37"), "labels.csv:3: Red is '37', expected 0 or 1"),
    "mixed": (SOUND.replace("val,0", "val,-1"), "has 0 in line 5 and -1 in line 3"),
    "short": (SOUND.replace("val,0", "val"), "labels.csv:3: 3 values, expected 4"),
    "split": (SOUND.replace("val", "hidden"), "labels.csv:3: the split is 'hidden'"),
    "row": (SOUND + "a.png,val,1,1\n", r"labels.csv:6: a second row for a.png .the first is line 2"),
    "outside": (SOUND.replace("d.png", "../d.png"), "image name '../d.png', expected a path below"),
    "no rows": ("image,Red\n", "has no row below its header"),
    "html": ("<!doctype html>", "is an HTML page"),
    "no val": (SOUND.replace("val", "train"), "no image of the val split among 4"),
    "missing": (SOUND + "e.png,train,1,1\n", "1 of 5 images are not in .* e.png; .*allow_subset=true"),
    "no row": (SOUND.replace("d.png,train,0,0\n", ""), "1 of 4 images have no row in labels.csv, .* d.png"),
    "one image": (SOUND + "d,val,1,1\n", "labels.csv: d.png and d are one image, d.png; remove one row"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tables_are_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", SOUND)
    table, message = BROKEN[case]
    (folder / "labels.csv").write_text(table)
    assert re.search(message, refusal(folder, tmp_path / "runs", capsys))


def test_two_tables_and_two_images_of_one_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", SOUND)
    (folder / "x").mkdir()
    (folder / "x" / "a.png").write_bytes(file_of(PICTURE, "PNG"))
    (folder / "labels.csv").write_text(SOUND.replace("a.png", "a"))
    with pytest.raises(DataError, match="a may be a.png or x/a.png; write the path out"):
        ImagesWithTable.open(folder)
    (folder / "other.csv").write_text(SOUND)
    with pytest.raises(DataError, match=r"2 .csv files are there \(labels.csv, other.csv\)"):
        ImagesWithTable.open(folder)


@pytest.mark.parametrize("allow_subset", [False, True])
def test_an_image_of_another_format_is_not_called_missing(allow_subset: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", SOUND + "e.BMP,train,1,1\n")
    with pytest.raises(DataError, match=r"e.BMP: is not JPEG, PNG or WebP; convert it, or remove its row"):
        ImagesWithTable.open(folder, allow_subset)


def test_a_link_to_nothing_is_a_missing_image_and_leftovers_of_macos_are_no_data(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", SOUND + "e.png,train,1,1\n")
    for name in ("._labels.csv", "._e.png", "._e.tar", "._e.parquet"):
        (folder / name).write_bytes(b"Mac OS X")
    assert recognise(folder) is ImagesWithTable
    assert len(ImagesWithTable.open(folder).keys) == 5
    (folder / "e.png").unlink()
    (folder / "e.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match="1 of 5 images are not in .*, the first is e.png"):
        ImagesWithTable.open(folder)
    assert len(ImagesWithTable.open(folder, allow_subset=True).keys) == 4


# ---- dataset.yaml, and the examples of the documentation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exclusive: [[Red, Blue]]", "key 'exclusive': 'Blue' is no attribute"),
        ("swept: Red", "key 'swept': got 'Red', expected a list"),
        ("colour: Red", "key 'colour' is not known; allowed are name"),
        ("- Red", "expected keys, got list"),
        ("a: [", "cannot be read as YAML"),
        ("!!python/object/apply:os.mkdir [harm]", "cannot be read as YAML"),
    ],
)
def test_facts_are_checked(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        with_own_facts(tmp_path, DatasetInfo("x"), ("Red", "Round"))


def test_the_examples_of_the_page_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text()
    for name in ("labels.csv", "dataset.yaml"):
        block = re.search(rf"^```text {name}\n(.*?)^```$", page, re.M | re.S)
        assert block is not None
        (tmp_path / name).write_text(block[1])
    table = read_table(tmp_path / "labels.csv")
    assert table.attributes == ("Red", "Round") and table.splits is not None
    info = with_own_facts(tmp_path, DatasetInfo("x"), table.attributes)
    assert info.exclusive == (("Red", "Round"),) and info.swept == ("Red",) and info.name == "birds"

"""The reader of CelebA's layout: what it accepts, and what it says about broken input."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.pixels import crop_centre, resize
from pipeline.data.sources.base import ImageError
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_images import MAX_BYTES, list_images
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.data.sources.decode import decode, read_image_file
from pipeline.errors import DataError
from tests.celeba_source import jpeg, make_source, write_images

ATTRIBUTES, PARTITION, ZIP, FOLDER = (
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
    "img_align_celeba.zip",
    "img_align_celeba",
)


def edit(file: Path, old: str, new: str) -> None:
    """Replace the first occurrence of `old`, which must be there."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def line(file: Path, number: int) -> str:
    """Line of a file, counted from 1."""
    return file.read_text().splitlines()[number - 1]


# ---- what is read


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("csv", [False, True])
def test_every_layout_reads_the_same(tmp_path: Path, archive: bool, csv: bool) -> None:
    celeba = Celeba.open(make_source(tmp_path / "with 'quotes' and spaces", archive=archive, csv=csv))
    plain = Celeba.open(make_source(tmp_path / "plain"))
    assert celeba.names == [f"{i:06d}.jpg" for i in range(1, 12)]
    np.testing.assert_array_equal(celeba.labels, np.random.default_rng(11).choice([-1, 1], (11, 40)) > 0)
    assert celeba.splits.tolist() == [0] * 7 + [1] * 2 + [2] * 2
    assert celeba.fingerprint["images"] == plain.fingerprint["images"]
    assert celeba.labels.dtype == np.uint8
    for i, name in enumerate(celeba.names):
        assert celeba.images.read_bytes(name) == jpeg(i)


def test_attribute_names_are_the_official_forty() -> None:
    assert len(set(CELEBA_ATTRIBUTES)) == 40
    assert list(CELEBA_ATTRIBUTES) == sorted(CELEBA_ATTRIBUTES)
    assert (CELEBA_ATTRIBUTES[15], CELEBA_ATTRIBUTES[20], CELEBA_ATTRIBUTES[31]) == (
        "Eyeglasses",
        "Male",
        "Smiling",
    )


def test_line_ends_byte_order_mark_and_row_order_do_not_matter(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a")
    before = Celeba.open(source)
    head, names, *rows = (source / ATTRIBUTES).read_text().splitlines()
    (source / ATTRIBUTES).write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join([head, names, *reversed(rows), "", ""]).encode()
    )
    after = Celeba.open(source)
    assert after.names == before.names
    np.testing.assert_array_equal(after.labels, before.labels)


def test_kaggles_folder_in_a_folder(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a", csv=True)
    (source / FOLDER).rename(source / "inner")
    (source / FOLDER).mkdir()
    (source / "inner").rename(source / FOLDER / FOLDER)
    assert len(Celeba.open(source).names) == 11


def test_members_elsewhere_in_the_zip_are_never_touched(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a", archive=True)
    with zipfile.ZipFile(source / ZIP, "a") as zipped:
        for name in (
            "../000001.jpg",
            f"{FOLDER}/../../000002.jpg",
            "/etc/000003.jpg",
            f"__MACOSX/{FOLDER}/._000001.jpg",
            f"{FOLDER}/sub/9.jpg",
        ):
            zipped.writestr(name, b"evil")
    celeba = Celeba.open(source)
    assert celeba.images.read_bytes("000001.jpg") == jpeg(0)
    assert len(celeba.names) == 11


def test_subset_only_when_asked_for(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a")
    (source / FOLDER / "000003.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 11 annotated images are not there.*000003.jpg.*shard.allow_subset=true"
    ):
        Celeba.open(source)
    celeba = Celeba.open(source, allow_subset=True)
    assert (len(celeba.names), len(celeba.annotated.splits)) == (10, 11)
    assert "000003.jpg" not in celeba.names
    whole = np.random.default_rng(11).choice([-1, 1], (11, 40)) > 0
    np.testing.assert_array_equal(celeba.labels, np.delete(whole, 2, axis=0))


# ---- what is refused


def drop_value(source: Path) -> None:
    """Cut the last value of the third row."""
    third = line(source / ATTRIBUTES, 5)
    edit(source / ATTRIBUTES, third, third[:-2].rstrip())


def change_value(value: str) -> Callable[[Path], None]:
    """Replace the first value of the first row."""

    def change(source: Path) -> None:
        first = line(source / ATTRIBUTES, 3)
        edit(source / ATTRIBUTES, first, " ".join([first.split()[0], value, *first.split()[2:]]))

    return change


def repeat_row(source: Path) -> None:
    """Repeat the first row in place of the last, so that the number of rows stays."""
    edit(source / ATTRIBUTES, line(source / ATTRIBUTES, 13), line(source / ATTRIBUTES, 3))


def cut_last_row(source: Path) -> None:
    """An annotation file whose download was cut at a line's end."""
    edit(source / ATTRIBUTES, line(source / ATTRIBUTES, 13) + "\n", "")


def drop_val(source: Path) -> None:
    """Declare the two val images train."""
    for name in ("000008.jpg", "000009.jpg"):
        edit(source / PARTITION, f"{name} 1", f"{name} 0")


BROKEN = {
    "39 values": (drop_value, r"list_attr_celeba.txt:5: 000003.jpg: 39 values, expected 40"),
    "value 0": (
        change_value("0"),
        r"list_attr_celeba.txt:3: 000001.jpg: 5_o_Clock_Shadow is '0', expected one of -1, 1",
    ),
    "value 11": (change_value("11"), r"list_attr_celeba.txt:3: 000001.jpg: 5_o_Clock_Shadow is '11'"),
    "value -": (change_value("-"), r"list_attr_celeba.txt:3: 000001.jpg: 5_o_Clock_Shadow is '-'"),
    "partition 3": (
        lambda s: edit(s / PARTITION, "000002.jpg 0", "000002.jpg 3"),
        r"partition.txt:2: 000002.jpg: partition is '3'",
    ),
    "duplicate": (repeat_row, r"list_attr_celeba.txt:13: a second row for 000001.jpg"),
    "cut": (cut_last_row, r"list_attr_celeba.txt:1: announces '11' rows, found 10"),
    "header": (
        lambda s: edit(s / ATTRIBUTES, "Arched_Eyebrows", "Arched_Brows"),
        r"list_attr_celeba.txt:2: expected the header",
    ),
    "empty": (lambda s: (s / ATTRIBUTES).write_text(""), r"list_attr_celeba.txt:2: expected the header"),
    "binary": (
        lambda s: (s / PARTITION).write_bytes(b"000001.jpg \xff"),
        r"partition.txt: is not plain ASCII",
    ),
    "path as name": (
        lambda s: edit(s / PARTITION, "000002.jpg", "../x.jpg"),
        r"partition.txt:2: image name '../x.jpg'",
    ),
    "dot in name": (
        lambda s: edit(s / PARTITION, "000002.jpg", "0.2.jpg"),
        r"partition.txt:2: image name '0.2.jpg'",
    ),
    "other release": (
        lambda s: edit(s / PARTITION, "000002.jpg", "900002.jpg"),
        r"partition.txt: 1 images of list_attr.*000002",
    ),
    "html": (
        lambda s: (s / ATTRIBUTES).write_text("\n<!DOCTYPE html>quota"),
        r"celeba.txt: is an HTML page, not an annotation file",
    ),
    "no attributes": (
        lambda s: (s / ATTRIBUTES).unlink(),
        r"neither list_attr_celeba.txt nor list_attr_celeba.csv",
    ),
    "no partition": (
        lambda s: (s / PARTITION).unlink(),
        r"neither list_eval_partition.txt nor list_eval_partition.csv",
    ),
    "no annotation": (
        lambda s: write_images(s, {"000099.jpg": jpeg(0)}, False),
        r"1 of 12 images have no annotation.*000099.jpg",
    ),
    "no val": (drop_val, r"no image of the val split \(value 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotations_are_named(tmp_path: Path, case: str) -> None:
    source = make_source(tmp_path / "a")
    damage, message = BROKEN[case]
    damage(source)
    with pytest.raises(DataError, match=message):
        Celeba.open(source)


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="nowhere: no such folder; shard.source must name one that holds img_align_celeba/"
    ):
        Celeba.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither img_align_celeba nor img_align_celeba.zip"):
        Celeba.open(tmp_path)
    source = make_source(tmp_path / "a")
    for file in (source / FOLDER).iterdir():
        file.unlink()
    with pytest.raises(DataError, match="holds no image"):
        Celeba.open(source)


def test_images_that_are_a_link_to_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "celeba")
    shutil.rmtree(source / FOLDER)
    (source / FOLDER).symlink_to(tmp_path / "not mounted")
    with pytest.raises(DataError, match="img_align_celeba: cannot be read .No such file or directory.; mend"):
        Celeba.open(source)


def test_html_page_saved_as_zip(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a", archive=True)
    (source / ZIP).write_text("<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
    with pytest.raises(DataError, match=r"celeba.zip: is an HTML page, not a zip archive.*download it again"):
        Celeba.open(source)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_zip(tmp_path: Path, kept: float) -> None:
    source = make_source(tmp_path / "a", archive=True)
    content = (source / ZIP).read_bytes()
    (source / ZIP).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"celeba.zip: is no complete zip archive.*download it again"):
        Celeba.open(source)


def test_damaged_and_huge_members(tmp_path: Path) -> None:
    source = make_source(tmp_path / "a", archive=True)
    with zipfile.ZipFile(source / ZIP, "a", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(f"{FOLDER}/huge.jpg", bytes(MAX_BYTES + 1))
    content = bytearray((source / ZIP).read_bytes())
    content[content.index(jpeg(4)) + 500] ^= 1
    (source / ZIP).write_bytes(content)
    images, _ = list_images(source / ZIP)
    with pytest.raises(ImageError, match="cannot be unpacked.*CRC"):
        images.read_bytes("000005.jpg")
    with pytest.raises(ImageError, match="larger than"):
        images.read_bytes("huge.jpg")
    assert images.read_bytes("000006.jpg") == jpeg(5)


# ---- pixels


def test_image_files_are_read_whole_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "1.jpg"
    file.write_bytes(jpeg(0))
    assert read_image_file(file, len(jpeg(0))) == jpeg(0)
    with pytest.raises(ImageError, match="larger than"):
        read_image_file(file, len(jpeg(0)) - 1)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image_file(tmp_path / "2.jpg", 1)


@pytest.mark.parametrize("cut", [1, 2, 3, 10, 100, 1000, "half", "header"])
def test_truncated_jpegs_are_refused(cut: int | str) -> None:
    whole = jpeg(0)
    keep = {"half": len(whole) // 2, "header": 100}.get(str(cut)) or len(whole) - int(cut)
    assert decode(whole).shape == (218, 178, 3)
    with pytest.raises(ImageError, match="damaged or truncated JPEG"):
        decode(whole[:keep])
    if cut != "header":
        with pytest.raises(ImageError, match="damaged or truncated JPEG"):
            decode(whole[: max(keep - 50, 700)] + b"\xff\xd9")  # closed again by hand


def test_other_content_is_refused() -> None:
    png = io.BytesIO()
    Image.new("RGB", (178, 218)).save(png, "PNG")
    for content, message in (
        (b"", "is empty"),
        (b"<html>", "is not a JPEG"),
        (b"GIF89a", "is not a JPEG, PNG or WebP file"),
        (png.getvalue()[:-30], "is a damaged or truncated PNG"),
    ):
        with pytest.raises(ImageError, match=message):
            decode(content)
    with pytest.raises(ImageError, match="is 218x178 pixels, expected 178x218"):
        decode(jpeg(0, 218, 178), (218, 178))


def test_grey_jpeg_becomes_rgb() -> None:
    grey = simplejpeg.encode_jpeg(
        np.full((218, 178, 1), 77, np.uint8), colorspace="GRAY", colorsubsampling="Gray"
    )
    assert (decode(grey) == 77).all()


def test_crop_is_centred() -> None:
    rows, columns = np.mgrid[0:218, 0:178].astype(np.uint8)
    cropped = crop_centre(np.stack([rows, columns, rows], 2), 148)
    assert cropped.shape == (148, 148, 3)
    assert (cropped[0, 0].tolist(), cropped[-1, -1].tolist()) == ([35, 15, 35], [182, 162, 182])


@pytest.mark.parametrize("size", [32, 64, 86, 128, 148, 200])
def test_resize_equals_pil(size: int) -> None:
    crops = np.stack([crop_centre(decode(jpeg(i)), 148) for i in range(3)])
    crops[2] = np.random.default_rng(0).integers(0, 256, crops[2].shape)
    resized = resize(crops, size)
    assert resized.dtype == np.uint8 and resized.flags.c_contiguous
    for crop, got in zip(crops, resized, strict=True):
        wanted = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(got.astype(int) - wanted).max() <= 1

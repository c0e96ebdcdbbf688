"""CelebA's images in other layouts give the manifest that the official layout gives."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.data.sources.registry import recognise
from pipeline.errors import DataError, UserError
from tests.celeba_source import jpeg, make_source
from tests.pipeline.data.sources.layouts import (
    make_manifest,
    refusal,
    write_celeba_hq,
    write_parquet,
    write_table,
    write_tars,
)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Celeba:
    return Celeba.open(make_source(tmp_path_factory.mktemp("official") / "celeba"))


@pytest.fixture(scope="module")
def official(celeba: Celeba, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        return make_manifest(celeba.images.place.parent, tmp_path_factory.mktemp("runs"))


LAYOUTS: dict[str, Callable[[Celeba, Path], object]] = {
    "parquet": write_parquet,
    "images+csv": write_table,
    "webdataset": write_tars,
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_same_images_give_the_same_manifest(
    kind: str, celeba: Celeba, official: dict[str, Any], tmp_path: Path
) -> None:
    LAYOUTS[kind](celeba, tmp_path / "data set")
    found = make_manifest(tmp_path / "data set", tmp_path / "runs")
    named = make_manifest(tmp_path / "data set", tmp_path / "named", f"shard.source_kind={kind}")
    assert named["content_digest"] == found["content_digest"]
    wanted = copy.deepcopy(official)
    if kind == "parquet":  # the digest of its images is that of the files' footers
        assert found["source"].pop("images") != wanted["source"].pop("images")
        assert found.pop("digest") != wanted.pop("digest")
    assert found == wanted


def test_celeba_hq_has_celebas_splits_and_its_own_crop(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (6, 40)).astype(np.uint8)
    images = {f"{i}.jpg": jpeg(i, 64, 64) for i in range(6)}
    originals = [1, 162_770, 162_771, 182_637, 182_638, 202_599]
    place = write_celeba_hq(tmp_path / "hq", images, labels, originals)
    found = make_manifest(place, tmp_path / "runs")
    assert [found["splits"][split]["samples"] for split in ("train", "val", "test")] == [2, 2, 2]
    assert (found["crop"], found["dataset"]["name"], found["dataset"]["native_size"]) == (
        0,
        "celeba_hq",
        None,
    )
    assert found["dataset"]["showcase"] == [["Heavy_Makeup", "Male"]]

    table = tmp_path / "table"
    table.mkdir()
    rows = [",".join(["image", "split", *CELEBA_ATTRIBUTES])]
    for number, content in enumerate(images.values()):
        (table / f"{number:05d}.jpg").write_bytes(content)
        values = ",".join(map(str, labels[number]))
        rows.append(f"{number:05d}.jpg,{number // 2},{values}")
    (table / "labels.csv").write_text("\n".join(rows))
    same = make_manifest(table, tmp_path / "runs")
    assert same["content_digest"] == found["content_digest"]
    assert same["source"] == found["source"]


def test_without_the_mapping_a_hash_makes_the_splits(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (60, 40)).astype(np.uint8)
    images = {f"{i}.jpg": jpeg(0, 16, 16) for i in range(60)}
    place = write_celeba_hq(tmp_path / "hq", images, labels, list(range(1, 61)))
    (place / "CelebA-HQ-to-CelebA-mapping.txt").unlink()
    splits = recognise(place).open(place, False).splits
    assert 38 <= (splits == 0).sum() <= 56 and {0, 1, 2} == set(splits.tolist())


def test_an_unknown_folder_lists_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        recognise(tmp_path)
    for words in ("img_align_celeba/", "CelebA-HQ-img/", "*.parquet", "*.tar", "one .csv"):
        assert words in str(caught.value)


def test_a_crop_once_made_is_not_mixed_up_with_another(celeba: Celeba, tmp_path: Path) -> None:
    place = write_table(celeba, tmp_path / "table")
    lines = (place / "labels.csv").read_text().replace(",Young", ",Aged").splitlines()
    (place / "labels.csv").write_text("\n".join(lines))
    assert make_manifest(place, tmp_path / "runs")["crop"] == 0  # not CelebA's attributes
    with pytest.raises(UserError, match=r"'shard.crop': got 148, but the shards in .* were cut with 0"):
        make_manifest(place, tmp_path / "runs", "shard.crop=148")


# ---- damaged variants


def cut(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def drop_column(folder: Path) -> None:
    from pyarrow import parquet

    file = folder / "data" / "test-00000.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns(["Male"]), file)


def text_column(folder: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    for file in (folder / "data").glob("*.parquet"):
        table = parquet.read_table(file)
        parquet.write_table(table.append_column("caption", arrow.array(["a"] * len(table))), file)


def no_bytes(folder: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    file = folder / "data" / "test-00000.parquet"
    table = parquet.read_table(file)
    kind = table.schema.field("image").type
    empty = arrow.array([{"bytes": None, "path": f"a{i}.jpg"} for i in range(len(table))], kind)
    parquet.write_table(table.set_column(0, "image", empty), file)


PARQUET = {
    "cut": (
        lambda f: cut(f / "data/train-00000.parquet", 0.6),
        "train-00000.parquet: is no complete parquet",
    ),
    "column": (drop_column, "parquet: column Male is not in all files"),
    "text": (text_column, "column caption holds string, expected true and false"),
    "no bytes": (no_bytes, "test-00000.parquet, row group 0, row 0: has no bytes in this row"),
    "split": (
        lambda f: (f / "data/test-00000.parquet").rename(f / "data/rest.parquet"),
        "rest.parquet: its name does not begin with train",
    ),
}


@pytest.mark.parametrize("case", PARQUET)
def test_damaged_parquet_is_named(
    case: str, celeba: Celeba, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_parquet(celeba, tmp_path / "data set", named=False)
    damage, message = PARQUET[case]
    damage(place)
    assert re.search(message, refusal(place, tmp_path / "runs", capsys))


def test_pyarrow_is_needed_only_for_parquet(
    celeba: Celeba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_parquet(celeba, tmp_path / "data set")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow.parquet.*pip install -e '.\[parquet\]'"):
        make_manifest(place, tmp_path / "runs")


def mapping_of_another_release(place: Path) -> None:
    file = place / "CelebA-HQ-to-CelebA-mapping.txt"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))


HQ = {
    "cut": (
        lambda p: cut(p / "CelebAMask-HQ-attribute-anno.txt", 0.7),
        "attribute-anno.txt:",
    ),
    "missing": (
        lambda p: (p / "CelebA-HQ-img/3.jpg").unlink(),
        "1 of 6 annotated images are not there.* 3.jpg",
    ),
    "mapping": (mapping_of_another_release, "mapping.txt: image 5 is not listed"),
    "stranger": (
        lambda p: shutil.copy(p / "CelebA-HQ-img/3.jpg", p / "CelebA-HQ-img/9.jpg"),
        "1 of 7 images are not in .*, the first is 9.jpg",
    ),
    "damaged": (lambda p: cut(p / "CelebA-HQ-img/3.jpg", 0.5), "3.jpg: is a damaged or truncated JPEG"),
}


@pytest.mark.parametrize("case", HQ)
def test_damaged_celeba_hq_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.ones((6, 40), np.uint8)
    images = {f"{i}.jpg": jpeg(i, 32, 32) for i in range(6)}
    place = write_celeba_hq(tmp_path / "hq", images, labels, [1, 2, 170_000, 170_001, 190_000, 190_001])
    damage, message = HQ[case]
    damage(place)
    assert re.search(message, refusal(place, tmp_path / "runs", capsys))

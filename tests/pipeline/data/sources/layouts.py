"""The images of a folder in CelebA's official layout, written in every other layout that is read."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import load as configuration
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.errors import exit_code
from pipeline.rundir import layout
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.stages import shard

WORDS = ("train", "validation", "test")


def make_manifest(place: str | Path, runs: Path, *overrides: str) -> dict[str, Any]:
    """Run the shard stage in this process; its manifest."""
    config = configuration.load(
        [],
        [
            f"shard.source={place}",
            f"runs_dir={runs}",
            "shard.size=8",
            "shard.samples_per_shard=3",
            *overrides,
        ],
    )
    shard.run(config, Context(runs / "run", Ranks(), StopFlag(), logging.getLogger("test")))
    manifest: dict[str, Any] = json.loads((layout.shards_dir(config) / "manifest.json").read_bytes())
    return manifest


def refusal(place: str | Path, runs: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The message about a data set that the shard stage refuses: exit code 2, one line, no manifest."""
    assert exit_code(lambda: make_manifest(place, runs, *overrides)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not list(runs.rglob("manifest.json"))
    return said


def write_parquet(celeba: Celeba, folder: Path, per_file: int = 4, named: bool = True) -> Path:
    """`data/train-00000-of-00002.parquet` and so on: image structs and 40 boolean columns."""
    import pyarrow as arrow
    from pyarrow import parquet

    (folder / "data").mkdir(parents=True)
    for split, word in enumerate(WORDS):
        rows = np.flatnonzero(celeba.splits == split)
        for number, first in enumerate(range(0, len(rows), per_file)):
            part = rows[first : first + per_file]
            images = [
                {
                    "bytes": celeba.images.read_bytes(celeba.names[row]),
                    "path": celeba.names[row] if named else None,
                }
                for row in part
            ]
            kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
            columns = {"image": arrow.array(images, kind), "celeb_id": arrow.array(range(len(part)))}
            for position in reversed(range(40)):  # the order of columns does not matter
                values = celeba.labels[part, position].astype(bool)
                columns[CELEBA_ATTRIBUTES[position]] = arrow.array(values)
            file = folder / "data" / f"{word}-{number:05d}.parquet"
            parquet.write_table(arrow.table(columns), file, row_group_size=3)
    return folder


def write_table(celeba: Celeba, folder: Path) -> Path:
    """`pictures/000001.jpg` and so on, and labels.csv with a split column."""
    (folder / "pictures").mkdir(parents=True)
    lines = [",".join(["image", "split", *CELEBA_ATTRIBUTES])]
    for row, name in enumerate(celeba.names):
        (folder / "pictures" / name).write_bytes(celeba.images.read_bytes(name))
        values = ",".join(map(str, celeba.labels[row]))
        lines.append(f"{name},{WORDS[celeba.splits[row]]},{values}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def json_label(labels: np.ndarray) -> bytes:
    """A JSON object of CelebA's attributes, beside facts that are no attributes."""
    tree = {name: bool(value) for name, value in zip(CELEBA_ATTRIBUTES, labels, strict=True)}
    return json.dumps({"width": 178, "url": "http://x", **tree}).encode()


def write_tars(
    celeba: Celeba, folder: Path, label: Callable[[np.ndarray], bytes] = json_label, ending: str = "json"
) -> list[Path]:
    """`train-000.tar` and so on, three samples each, by Python's tarfile."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split, word in enumerate(WORDS):
        rows = np.flatnonzero(celeba.splits == split)
        for number, first in enumerate(range(0, len(rows), 3)):
            files.append(folder / f"{word}-{number:03d}.tar")
            with tarfile.open(files[-1], "w") as tar:
                for row in rows[first : first + 3]:
                    add(tar, f"{celeba.keys[row]}.jpg", celeba.images.read_bytes(celeba.names[row]))
                    add(tar, f"{celeba.keys[row]}.{ending}", label(celeba.labels[row]))
    return files


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add one member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_celeba_hq(folder: Path, images: dict[str, bytes], labels: np.ndarray, originals: list[int]) -> Path:
    """`CelebA-HQ-img/0.jpg` and so on, the attributes, and the mapping to CelebA's images."""
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    (folder / "CelebAMask-HQ-mask-anno" / "0").mkdir(parents=True)
    (folder / "CelebAMask-HQ-mask-anno" / "0" / "00000_hair.png").write_bytes(b"a mask")
    rows = [str(len(images)), " ".join(CELEBA_ATTRIBUTES)]
    mapping = ["idx\torig_idx\torig_file"]
    for number, (name, content) in enumerate(images.items()):
        (folder / "CelebA-HQ-img" / name).write_bytes(content)
        rows.append(f"{name}  " + " ".join(str(2 * int(value) - 1) for value in labels[number]))
        mapping.append(f"{number}\t\t{originals[number] - 1}\t\t{originals[number]:06d}.jpg")
    (folder / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join(rows) + "\n")
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(mapping) + "\n")
    return folder

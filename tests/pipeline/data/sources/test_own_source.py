"""A data set that is not faces: one class and one line, and the stages below work on it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load as configuration
from pipeline.config import schema
from pipeline.data.annotations import read_annotations
from pipeline.data.loader import TrainBatches
from pipeline.data.shards import Shards
from pipeline.data.sources import registry
from pipeline.data.sources.base import Annotations, DatasetInfo, ImageError
from pipeline.errors import ConfigError, DataError
from pipeline.rundir import layout
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.stages import shard

NAMES = ("circle", "square", "red", "large", "left")
HEIGHT, WIDTH = 40, 50
INFO = DatasetInfo("shapes", (HEIGHT, WIDTH), exclusive=(("circle", "square"),), showcase=(("red", "left"),))


@dataclass(frozen=True)
class ShapeReader:
    """Draws an image from its name, e.g. "7": nothing is stored."""

    labels: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        if name == "13":
            raise ImageError("is torn")
        image = np.full((HEIGHT, WIDTH, 3), int(name), np.uint8)
        circle, square, red, large, left = self.labels[name]
        side = 16 if large else 8
        x = 10 if left else 24
        image[12 : 12 + side, x : x + side, 0 if red else 2] = 255
        if circle:
            image[12, x] = 0
        return image

    def where(self, name: str) -> str:
        return f"shape {name}"


class Shapes:
    """Fifty drawn shapes with five attributes; see `base.Source`."""

    expects = "shapes.txt"
    info = INFO
    attributes = NAMES
    location = "the pencil"

    def __init__(self) -> None:
        self.labels = np.random.default_rng(0).integers(0, 2, (50, 5)).astype(np.uint8)
        self.splits = np.array([0] * 30 + [1] * 10 + [2] * 10, np.uint8)
        self.names = [str(i) for i in range(50)]
        self.keys = [f"shape-{i:02d}" for i in range(50)]
        rows = [tuple(row) for row in self.labels.tolist()]
        self.images = ShapeReader(dict(zip(self.names, rows, strict=True)))
        more = np.ones((5, 5), np.uint8)  # annotated, but there is no such image
        self.annotated = Annotations(np.concatenate([self.labels, more]), np.append(self.splits, [0] * 5))
        self.fingerprint = {"shapes": "1"}

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / "shapes.txt").exists()

    @classmethod
    def estimate(cls, folder: Path) -> tuple[int, int]:
        return 50, 5

    @classmethod
    def open(cls, folder: Path, allow_subset: bool) -> Shapes:
        return cls()


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A configuration whose source is a folder of shapes; one process draws them."""
    monkeypatch.setitem(registry.SOURCES, "shapes", Shapes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "shapes.txt").touch()
    return [
        f"runs_dir={tmp_path / 'runs'}",
        f"shard.source={tmp_path / 'source'}",
        "shard.size=16",
        "shard.crop=32",
        "shard.samples_per_shard=8",
        "shard.skip_damaged=true",
        "data.flip=false",
    ]


def run(overrides: list[str]) -> Path:
    config = configuration.load([], overrides)
    shard.run(config, Context(Path(config.runs_dir) / "run", Ranks(), StopFlag(), logging.getLogger("test")))
    return layout.shards_dir(config)


def test_a_source_of_shapes_goes_through_stage_shards_and_loader(overrides: list[str]) -> None:
    folder = run(overrides)
    shards = Shards(folder, "train", "always")
    source = Shapes()
    assert shards.attribute_names == list(NAMES)
    assert (shards.size, shards.crop, len(shards)) == (16, 32, 29)  # one of thirty cannot be read
    assert shards.manifest["skipped"] == [["13", "is torn"]]
    images, attributes = shards.gather(np.arange(29))
    for key, image, labels in zip(shards.keys(np.arange(29)), images, attributes, strict=True):
        number = int(key.removeprefix("shape-"))
        assert labels.tolist() == source.labels[number].tolist()
        assert image[15, 15].tolist() == [number] * 3  # the corner shows the background

    config = configuration.load([], [*overrides, "data.attributes=[left,red]"])
    batch = TrainBatches(shards, config.data, 0, 8, 4, 0, 1).at(0)
    assert batch.images.shape == (8, 16, 16, 3)
    np.testing.assert_array_equal(batch.attributes.numpy(), attributes[batch.indices][:, [4, 2]])


def test_the_manifest_tells_evaluation_what_it_needs(overrides: list[str]) -> None:
    folder = run(overrides)
    shards = Shards(folder, "val")
    assert shards.info == INFO
    annotations = read_annotations(folder, shards.manifest, folder / "no source is needed")
    np.testing.assert_array_equal(annotations.labels, Shapes().annotated.labels)
    np.testing.assert_array_equal(annotations.splits, Shapes().annotated.splits)
    (folder / "annotations.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="annotations.safetensors: its sha256 differs"):
        read_annotations(folder, shards.manifest, folder)


def test_images_are_enlarged_only_on_request(overrides: list[str]) -> None:
    larger = [*overrides, "shard.size=33"]
    with pytest.raises(ConfigError, match=r"'shard.size': got 33, .* 'shard.crop' = 32.*allow_upsampling"):
        run(larger)
    assert Shards(run([*larger, "shard.allow_upsampling=true"]), "test").size == 33
    with pytest.raises(ConfigError, match=r"'shard.size': got 41, .* 50x40 pixels.*allow_upsampling"):
        run([*overrides, "shard.size=41", "shard.crop=0"])
    permitted = configuration.load([], [*overrides, "shard.allow_upsampling=true"])
    assert layout.shards_digest(permitted) == layout.shards_digest(configuration.load([], overrides))


def test_a_crop_larger_than_the_images_and_an_unknown_folder_are_refused(
    overrides: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'shard.crop': got 41, expected at most 40: the images have 50x40"):
        run([*overrides, "shard.crop=41"])
    (tmp_path / "source" / "shapes.txt").unlink()
    with pytest.raises(DataError, match="holds no data set that is known here; expected .*img_align_celeba"):
        run(overrides)


def test_every_kind_can_be_named_in_a_configuration() -> None:
    assert {"toy", *schema.SOURCE_NAMES} == registry.SOURCES.keys()  # toy faces: an empty shard.source

"""The shard stage: what it leaves behind, what it refuses, and how it goes on after an interruption."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load as configuration
from pipeline.config.schema import RunConfig
from pipeline.data import writer
from pipeline.data.shards import Shards
from pipeline.data.sources.celeba import Celeba
from pipeline.errors import ConfigError, DataError, exit_code
from pipeline.run import run_stage
from pipeline.rundir import layout
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.ports import free_port
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import shard
from tests.celeba_source import jpeg, make_source
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process (test_shards.py compares several with one) and a cache of the test's own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven train, two val and two test images."""
    return make_source(tmp_path / "celeba source")


def make_config(source: Path | str, *overrides: str, runs: Path | None = None) -> RunConfig:
    """Small shards of `source`, under its neighbour runs/."""
    runs = runs or Path(source).parent / "runs"
    return configuration.load(
        [],
        [
            f"runs_dir={runs}",
            f"shard.source='{source}'",
            "shard.size=32",
            "shard.samples_per_shard=3",
            *overrides,
        ],
    )


def run(config: RunConfig, stop: StopFlag | None = None) -> Path:
    """Run the stage in this process; the folder of its shards."""
    shard.run(
        config, Context(Path(config.runs_dir) / "run", Ranks(), stop or StopFlag(), logging.getLogger("test"))
    )
    return layout.shards_dir(config)


def tars(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of every tar."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.tar")}


# ---- what it makes


def test_shards_of_a_folder(source: Path) -> None:
    folder = run(make_config(source))
    assert sorted(tars(folder)) == [
        "test-00000.tar",
        "train-00000.tar",
        "train-00001.tar",
        "train-00002.tar",
        "val-00000.tar",
    ]
    assert {split: len(Shards(folder, split, "always")) for split in ("train", "val", "test")} == {
        "train": 7,
        "val": 2,
        "test": 2,
    }
    assert not list(folder.glob(".*"))
    assert str(source) not in (folder / "manifest.json").read_text()


def test_a_second_run_changes_nothing(source: Path) -> None:
    config = make_config(source)
    before = tars(run(config))
    shutil.rmtree(source)  # not even looked at
    assert tars(run(config)) == before


def test_labels_that_changed_since_are_told(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(source)
    folder = run(config)
    for file in source.rglob("*"):
        os.utime(file, ns=(0, 0))  # else a slow clock may make them as new as the shards
    run(config)
    assert "is newer" not in caplog.text
    os.utime(source / "list_attr_celeba.txt")
    run(config)
    assert f"list_attr_celeba.txt: is newer than the shards in {folder}; delete that folder" in caplog.text


def test_a_subset_is_counted(source: Path) -> None:
    (source / "img_align_celeba" / "000001.jpg").unlink()
    with pytest.raises(DataError, match="shard.allow_subset=true"):
        run(make_config(source))
    folder = run(make_config(source, "shard.allow_subset=true"))
    assert Shards(folder, "train").manifest["counts"] == {"annotated": 11, "present": 10, "skipped": 0}


def test_toy_faces_where_no_source_is_given(tmp_path: Path) -> None:
    config = make_config("", "toy.n=20", runs=tmp_path / "runs")
    shards = Shards(run(config), "train")
    assert (len(shards), shards.size, len(shards.attribute_names)) == (16, 32, 40)
    assert (layout.toy_dir(config) / "list_attr_celeba.txt").exists()


def test_two_ranks_share_one_stage(source: Path) -> None:
    config = make_config(source)
    run_dir = Path(config.runs_dir) / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(configuration.dump(config))
    port = free_port()
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pipeline.run", str(run_dir), "shard"]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert len(Shards(layout.shards_dir(config), "train")) == 7


# ---- what it refuses


def test_a_users_mistake_ends_with_code_2_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "nowhere")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(configuration.dump(config))
    assert exit_code(lambda: run_stage(run_dir, "shard")) == 2
    assert f"error: {tmp_path}/nowhere: no such folder; shard.source must name" in capsys.readouterr().err


def test_crop_larger_than_the_image(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"'shard.crop': got 179, expected at most 178"):
        run(make_config(source, "shard.crop=179"))
    assert len(Shards(run(make_config(source, "shard.crop=178")), "train")) == 7


DAMAGE = {
    "truncated": (jpeg(1)[:-300], "damaged or truncated JPEG"),
    "page": (b"<html>gone</html>", "is not a JPEG, PNG or WebP file"),
    "empty": (b"", "is empty"),
    "size": (jpeg(1, 178, 200), "is 178x200 pixels, expected 178x218"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_image_is_named_or_skipped_and_counted(source: Path, case: str) -> None:
    content, reason = DAMAGE[case]
    (source / "img_align_celeba" / "000002.jpg").write_bytes(content)
    config = make_config(source)
    with pytest.raises(DataError, match=rf"img_align_celeba/000002.jpg: .*{reason}.*shard.skip_damaged=true"):
        run(config)
    assert not (layout.shards_dir(config) / "manifest.json").exists()
    shards = Shards(run(make_config(source, "shard.skip_damaged=true")), "train")
    assert shards.manifest["counts"] == {"annotated": 11, "present": 11, "skipped": 1}
    [[name, said]] = shards.manifest["skipped"]
    assert name == "000002.jpg" and reason in said
    assert shards.keys(np.arange(len(shards))).count("000002") == 0
    assert len(shards) == 6
    assert shards.manifest["splits"]["train"]["label_counts"] == shards.attributes().sum(0).tolist()


def test_a_split_of_damaged_images_only(source: Path) -> None:
    for name in ("000008.jpg", "000009.jpg"):
        (source / "img_align_celeba" / name).write_bytes(b"")
    with pytest.raises(DataError, match="all 2 images of val-00000.tar are damaged, .*000008.jpg: is empty"):
        run(make_config(source, "shard.skip_damaged=true"))


def test_a_full_disk_is_noticed_before_writing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    config = make_config(source)
    with pytest.raises(DataError, match=r"the shards need 6\.\d+e-05 GB, 1e-06 GB are free; make room"):
        run(config)
    assert not tars(layout.shards_dir(config))


# ---- interruptions


class StopAfter(StopFlag):
    """A stop request that arrives after `checks` looks at it."""

    def __init__(self, checks: int) -> None:
        self.checks = checks

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Whether it has arrived."""
        self.checks -= 1
        return self.checks < 0


@pytest.fixture
def interrupted(source: Path) -> RunConfig:
    """A stage that was stopped after two of five shards."""
    config = make_config(source)
    with pytest.raises(Stopped):
        run(config, StopAfter(2))
    assert sorted(tars(layout.shards_dir(config))) == ["train-00000.tar", "train-00001.tar"]
    return config


def same_as_uninterrupted(config: RunConfig, folder: Path, *overrides: str) -> bool:
    """Whether manifest and tars equal those of a run in one go, elsewhere."""
    other = Path(config.runs_dir).parent / "other runs"
    whole = run(make_config(config.shard.source, *overrides, runs=other))
    names = {"manifest.json", *tars(whole)}
    return (
        all((whole / name).read_bytes() == (folder / name).read_bytes() for name in names)
        and tars(whole).keys() == tars(folder).keys()
    )


def test_a_stopped_stage_goes_on_where_it_was(interrupted: RunConfig) -> None:
    folder = layout.shards_dir(interrupted)
    finished = tars(folder)
    (folder / ".train-00002.tar.1.tmp").write_bytes(b"left by a killed process")
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"file": "train-0000')  # a line that was cut off
    run(interrupted)
    assert finished.items() <= tars(folder).items()  # not written again
    assert not list(folder.glob(".*"))
    assert same_as_uninterrupted(interrupted, folder)


def test_a_finished_shard_that_was_damaged_since_is_made_again(interrupted: RunConfig) -> None:
    folder = layout.shards_dir(interrupted)
    content = bytearray((folder / "train-00001.tar").read_bytes())
    content[5000] ^= 1
    (folder / "train-00001.tar").write_bytes(content)
    run(interrupted)
    assert same_as_uninterrupted(interrupted, folder)


def test_shards_of_a_source_that_changed_are_not_kept(interrupted: RunConfig) -> None:
    folder = layout.shards_dir(interrupted)
    (Path(interrupted.shard.source) / "img_align_celeba" / "000001.jpg").write_bytes(jpeg(77) + b"\0")
    run(interrupted)
    assert same_as_uninterrupted(interrupted, folder)


def test_shards_of_another_crop_are_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    names = [f"{number}.jpg" for number in range(7)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number, 178, 200))
    splits = ["train"] * 5 + ["val", "test"]
    rows = [f"{name},{split},1" for name, split in zip(names, splits, strict=True)]
    (folder / "labels.csv").write_text("\n".join(["image,split,Red", *rows]))
    largest, cut = make_config(folder), make_config(folder, "shard.crop=148")
    assert layout.shards_dir(largest) == layout.shards_dir(cut)
    with pytest.raises(Stopped):
        run(largest, StopAfter(1))
    assert same_as_uninterrupted(cut, run(cut), "shard.crop=148")


def test_one_bad_shard_is_mended_by_deleting_it_and_the_manifest(source: Path) -> None:
    config = make_config(source)
    folder = run(config)
    before = tars(folder)
    (folder / "train-00001.tar").unlink()
    (folder / "manifest.json").unlink()
    run(config)
    changed = {name for name, state in tars(folder).items() if state != before[name]}
    assert changed == {"train-00001.tar"}
    assert same_as_uninterrupted(config, folder)


def test_workers_finish_the_shards_in_flight_before_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("pipeline.stages.shard.WORTH_A_PROCESS", 1)
    config = make_config(make_source(tmp_path / "celeba", train=200), "shard.samples_per_shard=1")
    with pytest.raises(Stopped):
        run(config, StopAfter(0))
    folder = layout.shards_dir(config)
    finished = tars(folder)
    noted = [json.loads(line)["file"] for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]
    assert sorted(noted) == sorted(finished)
    assert 0 < len(finished) < 204
    assert not list(folder.glob(".*"))


def test_a_write_that_fails_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    config = make_config(source)
    tasks = writer.plan_shards(Celeba.open(source), config.shard, source)
    monkeypatch.setattr(writer.os, "fsync", full)
    before = set(source.iterdir())
    with pytest.raises(OSError, match="No space left"):
        writer.write_shard(tasks[0])
    assert set(source.iterdir()) == before


def test_one_process_at_a_time(source: Path) -> None:
    config = make_config(source)
    lock = layout.shards_dir(config).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Stopped):
            run(config, StopAfter(0))
    assert not layout.shards_dir(config).exists()
    assert len(Shards(run(config), "train")) == 7


# ---- shards of others


def test_complete_shards_that_can_only_be_read_are_left_alone(source: Path) -> None:
    folder = run(make_config(source))
    for lock in folder.parent.glob("*.lock"):
        lock.unlink()
    before = {file: file.stat().st_mtime_ns for file in folder.parent.rglob("*")}
    run(make_config(source))
    assert {file: file.stat().st_mtime_ns for file in folder.parent.rglob("*")} == before


def test_given_shards_need_no_source(source: Path, tmp_path: Path) -> None:
    given = shutil.copytree(run(make_config(source)), tmp_path / "given")
    shutil.rmtree(source)
    before = tars(given)
    config = make_config(source, f"data.shards={given}", runs=tmp_path / "other runs")
    assert run(config) == given and tars(given) == before
    assert len(Shards(given, "train")) == 7
    assert not layout.shared_dir(config).exists()

"""Tars of others that stay where they lie: an index and a link for each, the same samples as packed ones."""

from __future__ import annotations

import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.load import load
from pipeline.data.loader import TrainBatches
from pipeline.data.shards import Shards
from pipeline.data.sources.celeba import Celeba
from pipeline.data.staging import open_shards, staged
from pipeline.errors import DataError
from pipeline.rundir import layout
from tests.celeba_source import make_source
from tests.conftest import run_stage_here
from tests.pipeline.data.sources.layouts import add, refusal, write_tars
from tools import check_shards


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three training tars, one of validation and one of testing."""
    celeba = Celeba.open(make_source(tmp_path / "celeba"))
    return write_tars(celeba, tmp_path / "tars")[0].parent


def made(place: Path, runs: Path, form: str, *overrides: str) -> tuple[Path, dict[str, Shards]]:
    """Run the shard stage; its run directory and the splits."""
    words = [f"shard.source={place}", f"runs_dir={runs}", "shard.size=8", f"shard.format={form}", *overrides]
    config = load([], words)
    run_dir = runs / form
    run_stage_here(config, run_dir, "shard")
    folder = layout.shards_dir(config)
    return run_dir, {split: open_shards(folder, split, config.data) for split in ("train", "val", "test")}


def samples(shards: Shards) -> dict[str, tuple[bytes, bytes]]:
    images, labels = shards.gather(np.arange(len(shards)))
    keys = shards.keys(np.arange(len(shards)))
    return {
        key: (image.tobytes(), row.tobytes()) for key, image, row in zip(keys, images, labels, strict=True)
    }


def test_the_samples_are_those_of_packed_shards_and_no_image_is_copied(tars, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in tars.iterdir()}
    run_dir, ours = made(tars, tmp_path / "runs", "in_place")
    _, packed = made(tars, tmp_path / "runs", "encoded")
    for split in ("train", "val", "test"):
        assert samples(ours[split]) == samples(packed[split])
    folder = ours["train"].folder
    links = {file.name: file.readlink().name for file in folder.glob("*.tar")}
    assert links == {
        **{f"train-{number:05d}.tar": f"train-{number:03d}.tar" for number in range(3)},
        "val-00000.tar": "validation-000.tar",
        "test-00000.tar": "test-000.tar",
    }
    config = load([run_dir / "config.yaml"])
    batches = [TrainBatches(ours["train"], config.data, 0, 4, 8, rank, 2).at(0).indices for rank in (0, 1)]
    assert len(set(np.concatenate(batches).tolist())) == 4
    check_shards.main([str(run_dir)])
    assert "intact" in capsys.readouterr().out
    local = staged(folder, str(tmp_path / "node"), logging.getLogger("test"))
    assert local != folder and not any(file.is_symlink() for file in local.iterdir())
    assert samples(open_shards(local, "train", config.data)) == samples(ours["train"])
    made(tars, tmp_path / "runs", "in_place")  # a second time nothing is made
    assert before == {file.name: file.read_bytes() for file in tars.iterdir()}


def test_a_tar_with_several_splits_has_an_index_for_each(tars, tmp_path):
    many = Celeba.open(make_source(tmp_path / "many", train=60))
    tars = write_tars(many, tmp_path / "mixed")[0].parent
    for number, file in enumerate(sorted(tars.iterdir())):
        file.rename(tars / f"{number:03d}.tar")  # a hash of the keys makes the splits then
    _, ours = made(tars, tmp_path / "runs", "in_place")
    _, packed = made(tars, tmp_path / "runs", "encoded")
    links = [file.readlink().name for file in ours["train"].folder.glob("*.tar")]
    assert len(links) > len(set(links))
    for split in ("train", "val", "test"):
        assert samples(ours[split]) == samples(packed[split])


def test_a_tar_that_changed_is_named_and_repair_leaves_it_alone(tars, tmp_path, capsys):
    run_dir, ours = made(tars, tmp_path / "runs", "in_place")
    tar = tars / "train-001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00001.tar: its sha256 differs"):
        open_shards(ours["train"].folder, "train", load([run_dir / "config.yaml"]).data)
    with pytest.raises(DataError):
        check_shards.main([str(run_dir), "--repair", str(run_dir)])
    assert tar.read_bytes() == bytes(content)
    tar.unlink()
    with pytest.raises(SystemExit):
        check_shards.main([str(run_dir)])
    assert "train-00001.tar: is listed in manifest.json but cannot be read" in capsys.readouterr().out


def test_a_damaged_image_is_named_or_left_out_of_the_index(tars, tmp_path, capsys):
    with tarfile.open(tars / "train-001.tar", "a") as tar:
        add(tar, "broken.jpg", b"\xff\xd8 no image")
        add(tar, "broken.json", _label_of(tars / "train-001.tar"))
    said = refusal(tars, tmp_path / "refused", capsys, "shard.format=in_place")
    assert "train-001.tar, image at byte" in said and "shard.skip_damaged=true" in said
    _, ours = made(tars, tmp_path / "runs", "in_place", "shard.skip_damaged=true")
    assert len(ours["train"]) == 7 and "broken" not in samples(ours["train"])


def _label_of(file: Path) -> bytes:
    with tarfile.open(file) as tar:
        member = next(member for member in tar if member.name.endswith(".json"))
        stored = tar.extractfile(member)
        assert stored is not None
        return stored.read()


def test_only_tars_on_a_disk_can_stay_in_place(tars, tmp_path, capsys):
    said = refusal(tmp_path / "celeba", tmp_path / "runs", capsys, "shard.format=in_place")
    assert "key 'shard.format': got 'in_place', but" in said and "use encoded" in said
    place = f"pipe:cat {tars}/{{train,validation,test}}-000.tar"
    said = refusal(place, tmp_path / "runs", capsys, "shard.format=in_place", "shard.allow_pipe=true")
    assert "key 'shard.format': got 'in_place'" in said

"""Shards on a node-local disk: what is copied, when it is not, and that damage never gets there."""

import logging
import multiprocessing
import shutil
from pathlib import Path

import pytest

from pipeline.config import load as configuration
from pipeline.data.manifest import read_manifest
from pipeline.data.shards import Shards
from pipeline.data.staging import staged
from pipeline.errors import DataError
from pipeline.rundir import layout

LOG = logging.getLogger("cvae.test")


@pytest.fixture
def folder(tiny_overrides, tmp_path) -> Path:
    """A copy of finished shards that a test may damage."""
    return Path(
        shutil.copytree(
            layout.shards_dir(configuration.load([], tiny_overrides)), tmp_path / "shared" / "abc"
        )
    )


def test_the_copy_is_read_and_made_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path / "node"))
    local = staged(folder, "$LOCAL_DISK", LOG)
    assert local == tmp_path / "node" / "cvae-shards" / read_manifest(folder)["content_digest"][:12]
    before = {file: file.stat().st_mtime_ns for file in local.iterdir()}
    assert staged(folder, "$LOCAL_DISK", LOG) == local
    assert {file: file.stat().st_mtime_ns for file in local.iterdir()} == before
    theirs, ours = Shards(folder, "train").gather([0, 7, 3]), Shards(local, "train").gather([0, 7, 3])
    assert (theirs[0] == ours[0]).all() and (theirs[1] == ours[1]).all()


def test_ranks_of_a_node_share_one_copy(folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=staged, args=(folder, str(tmp_path / "node"), LOG)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    local = tmp_path / "node" / "cvae-shards" / read_manifest(folder)["content_digest"][:12]
    assert sorted(f.name for f in local.iterdir()) == sorted(
        f.name for f in folder.iterdir() if not f.name.startswith(("journal", "annotations"))
    )


def test_an_interrupted_copy_is_completed(folder, tmp_path):
    local = staged(folder, str(tmp_path / "node"), LOG)
    (local / "manifest.json").unlink()
    victim = next(local.glob("train-*.tar"))
    victim.write_bytes(victim.read_bytes()[:-512])
    assert staged(folder, str(tmp_path / "node"), LOG) == local
    assert victim.read_bytes() == (folder / victim.name).read_bytes()


def test_damage_does_not_reach_the_copy(folder, tmp_path):
    victim = next(folder.glob("train-*.tar"))
    content = bytearray(victim.read_bytes())
    content[3000] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DataError, match=victim.name):
        staged(folder, str(tmp_path / "node"), LOG)
    assert not list((tmp_path / "node").rglob("manifest.json"))
    assert (
        staged(folder, str(tmp_path / "node"), LOG, damaged="exclude") == folder
    )  # whose reader leaves it out and counts


@pytest.mark.parametrize(
    "target", ["$NOT_SET_ANYWHERE/x", "/proc/nowhere", "~nobody-is-called-so/x", "a/relative/folder"]
)
def test_read_in_place_where_there_is_no_such_place(folder, target, caplog):
    assert staged(folder, target, LOG) == folder
    assert "read in place" in caplog.text


def test_a_home_is_expanded_on_the_node(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert staged(folder, "~/node", LOG).is_relative_to(tmp_path / "home" / "node")


def test_read_in_place_where_the_disk_is_too_small(folder, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert staged(folder, str(tmp_path / "node"), LOG) == folder
    assert "are free" in caplog.text

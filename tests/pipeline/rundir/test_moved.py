"""A run whose folder has moved is used where it lies now, and nothing makes the old folder again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.config.load import dump
from pipeline.config.paths import database_file, sqlite_uri
from pipeline.prepare import prepare, recorded, resolved
from pipeline.rundir import layout, record
from slurm import ledger
from slurm.status import log_of
from tests.tiny_run import make_shards, tiny_config


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder of runs with shards and one run, whose store lies in it too."""
    runs = tmp_path / "old"
    config = tiny_config(runs, f"tracking.uri=sqlite:///{runs}/team.db")
    make_shards(config)
    logs = runs / "a" / "logs" / "train" / "submitit" / "1"
    logs.mkdir(parents=True)
    (runs / "a" / "config.yaml").write_text(dump(config))
    ledger.submitted(runs / "a", "train", "7", ledger.Submission("local", str(logs)))
    ledger.started(runs / "a", "train", "7", ["here"])
    ledger.note_failure(runs / "a", "train", 0, ValueError("lost"), "7")
    (logs / "7_0_log.err").write_text("ValueError: lost\n")
    return runs


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a link to the new place"])
def test_the_whole_folder(old: Path, tmp_path: Path, left: str) -> None:
    new = tmp_path / "new"
    old.rename(new)
    if left == "an empty folder":
        old.mkdir()
    if left == "a link to the new place":
        old.symlink_to(new)
    config = record.run_config(new / "a")
    assert layout.shards_dir(config).joinpath(layout.MANIFEST).exists()
    assert log_of(new / "a", None, None).read_text() == "ValueError: lost\n"
    if left != "a link to the new place":
        assert config.runs_dir == str(new) and config.tracking.uri == f"sqlite:///{new}/team.db"
    prepare(new / "a", resolved(config), ["train"])
    assert left != "nothing" or not old.exists()


def test_a_store_whose_address_is_encoded_moves_too(tmp_path: Path) -> None:
    """The address of a file says %25 for a per cent sign, and may have options behind a `?`."""
    old, new = tmp_path / "100% old?", tmp_path / "new 50%"
    config = resolved(tiny_config(old, f"tracking.uri='{sqlite_uri(old / 'team.db')}?timeout=9'"))
    (old / "a").mkdir(parents=True)
    (old / "a" / "config.yaml").write_text(dump(config))
    old.rename(new)
    uri = record.run_config(new / "a").tracking.uri
    assert database_file(uri) == new / "team.db" and uri.endswith("team.db?timeout=9")


def test_one_run_alone_whose_old_folder_is_gone(old: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (old / "a").rename(archive / "a")
    assert record.run_config(archive / "a").runs_dir == str(old)  # its shards are still there
    shutil.rmtree(old)
    config = recorded(archive / "a")
    assert config is not None and config.runs_dir == str(archive)
    prepare(archive / "a", resolved(config), ["train"])
    assert not old.exists()


def test_a_run_that_never_lay_in_its_runs_folder(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    prepare(tmp_path / "elsewhere" / "a", config, ["shard"])
    assert record.run_config(tmp_path / "elsewhere" / "a") == config

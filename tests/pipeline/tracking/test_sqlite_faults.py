"""A SQLite store that is locked or full is completed later."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipeline.tracking.mlflow import store as mlflow_store
from pipeline.tracking.sync import sync_run, tracker_of
from tests.conftest import ROOT
from tests.fake_run import add_metrics, make_run
from tests.pipeline.tracking.in_store import assert_holds_file_once, client, parent_of
from tools import sync_mlflow


def test_locked_store_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, steps=1)
    monkeypatch.setattr(mlflow_store, "LOCK_TIMEOUT_S", 0.0)
    with mlflow_store.database_lock(f"sqlite:///{tmp_path}/mlflow.db"):
        sync_run(run)
    assert "mlflow.db.lock" in caplog.text and not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow  # MLflow waits 20 s for the lock
@pytest.mark.usefixtures("with_store")
def test_a_database_that_another_program_locks_is_completed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # else a minute
    run = make_run(tmp_path, steps=2)
    tracker_of(run).push()
    add_metrics(run, range(3, 6))
    holder = sqlite3.connect(tmp_path / "mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    sync_run(run)
    assert "locked" in caplog.text and f"tools/sync_mlflow.py {run}" in caplog.text
    holder.rollback()
    holder.close()
    tracker_of(run).push()
    assert_holds_file_once(client(tmp_path), parent_of(client(tmp_path), "cvae").info.run_id, run)


@pytest.mark.usefixtures("with_store")
def test_a_run_that_was_never_sent_can_be_sent_to_any_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes without a network train with tracking.enabled=false; another machine sends their runs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere.invalid:5000")  # for launches, not for runs
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of another")
    run = make_run(tmp_path, overrides=("tracking.enabled=false",), steps=2)
    before = (run / "config.yaml").read_bytes()
    sync_mlflow.main([str(run)])
    other = tmp_path / "other"
    other.mkdir()
    words = [str(run), "--uri", f"sqlite:///{other}/mlflow.db", "--experiment", "faces"]
    for _ in range(2):
        sync_mlflow.main(words)
    assert_holds_file_once(client(other), parent_of(client(other), "faces").info.run_id, run)
    assert (run / "config.yaml").read_bytes() == before
    tracked = make_run(tmp_path, "tracked", steps=1)
    sync_mlflow.main([str(tracked)])
    assert_holds_file_once(client(tmp_path), parent_of(client(tmp_path), "cvae").info.run_id, tracked)


@pytest.mark.slow  # three processes that import mlflow; a locked database takes the same way
def test_a_full_disk_under_the_store_is_completed_later(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the database cannot grow."""
    run = make_run(tmp_path, steps=2)
    tracker_of(run).push()
    add_metrics(run, range(3, 400))
    size = (tmp_path / "mlflow.db").stat().st_size
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    command = [sys.executable, "tools/sync_mlflow.py", str(run)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert failed.returncode == 2 and "nothing is lost" in failed.stderr and "Traceback" not in failed.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    assert_holds_file_once(client(tmp_path), parent_of(client(tmp_path), "cvae").info.run_id, run)

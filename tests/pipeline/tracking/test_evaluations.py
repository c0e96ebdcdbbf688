"""Evaluations are child runs, and the run's state follows its files."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import run as command
from pipeline.rundir import record
from pipeline.tracking.base import TrackingError
from pipeline.tracking.sync import sync_run, tracker_of
from tests.fake_run import add_eval, add_metrics, make_run
from tests.pipeline.tracking.in_store import assert_holds_file_once, client, parent_of, runs_of


def test_evaluations_are_children_and_head_the_parent(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs, "evals", ("tracking.experiment=evals", "name=paper"), steps=5, evals=1, step=90)
    (run / "eval/2").mkdir()  # not complete
    from mlflow.tracking import MlflowClient

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", crash)
        with pytest.raises(TrackingError, match="disk full"):
            tracker_of(run).push()
    (run / "report.html").write_text("<html></html>")
    for _ in range(2):
        tracker_of(run).push()
    store = client(runs)
    parent = parent_of(store, "evals")
    (child,) = [r for r in runs_of(store, "evals") if r.info.run_id != parent.info.run_id]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.info.run_name, child.info.status, child.data.tags["variant"]) == (
        "evals eval 1 (test, N=3000)",
        "FINISHED",
        "paper",
    )
    assert child.data.params["split"] == "test" and child.data.params["n"] == "3000"
    wanted = {
        "distance": 21.5,
        "sharpness": 0.4,
        "obedience": 0.9,
        "eval/frechet/fd_classifier_samples": 21.5,
        "reference/fd_classifier_samples_low": 21.0,
        "reference/fd_classifier_samples_high": 22.0,
    }
    wanted |= {"reference/attribute_accuracy_ceiling": 0.95, "reference/attribute_accuracy_floor": 0.6}
    assert wanted.items() <= child.data.metrics.items()
    assert "eval/other/attribute_accuracy_shuffled" not in child.data.metrics  # it stands beside another
    assert len(store.get_metric_history(child.info.run_id, "eval/other/mse")) == 1
    assert {f.path for f in store.list_artifacts(child.info.run_id)} == {"metrics.json", "samples"}
    headline = store.get_metric_history(parent.info.run_id, "distance")
    assert [(m.step, m.value) for m in headline] == [(0, 21.5)]  # a bar, not a curve of one point
    note = parent.data.tags["mlflow.note.content"]
    place = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts"
    assert "optimal decoder variance, prior a conditional flow" in note and f"({place}/report.html)" in note
    assert "| distance to real images (`distance`) | 21.5 | 300 | 1.2 |" in note
    assert {f.path for f in store.list_artifacts(parent.info.run_id)} == {
        "config.yaml",
        "report.html",
        "eval_1",
    }
    assert len(store.list_artifacts(parent.info.run_id, "eval_1")) == 2  # its pictures

    later = add_eval(run, 3, step=90, fd=20.0) / "metrics.json"  # again, on the same checkpoint
    os.utime(later, (later.stat().st_atime, later.stat().st_mtime + 60))
    for _ in range(2):
        tracker_of(run).push()
    assert parent_of(store, "evals").data.metrics["distance"] == 20.0
    assert len(store.get_metric_history(parent.info.run_id, "distance")) == 2
    assert len(store.get_metric_history(parent.info.run_id, "eval/other/mse")) == 1
    names = [f"evals eval {number} (test, N=3000)" for number in (1, 3)]
    assert sorted(r.info.run_name for r in runs_of(store, "evals")) == ["evals", *names]


def test_status_follows_the_files(runs: Path) -> None:
    run = make_run(runs, "status", ("tracking.experiment=status",), steps=1)
    store = client(runs)

    def status() -> str:
        tracker_of(run).push()
        return parent_of(store, "status").info.status

    def touch(file: Path, at: int) -> None:
        os.utime(file, (at, at))

    assert status() == "RUNNING"
    touch(run / "train/metrics.jsonl", 100)
    (run / "logs/train").mkdir(parents=True)
    (run / "logs/train/error.json").write_text("{}")
    touch(run / "logs/train/error.json", 200)
    assert status() == "FAILED"
    add_metrics(run, range(2, 3))  # resumed
    assert status() == "RUNNING"
    (run / "train/done.json").write_text('{"step": 8, "images": 999, "seconds": 5}')  # of a shorter length
    assert status() == "RUNNING"
    (run / "train/done.json").write_text('{"step": 8, "images": 1024, "seconds": 5}')
    (run / "jobs.json").write_text('[{"stage": "eval", "id": "9", "state": "PENDING"}]')
    assert status() == "RUNNING"  # the evaluation is still to come
    add_eval(run, 1)
    assert status() == "FINISHED"
    assert parent_of(store, "status").info.end_time == int(
        (run / "eval/1/metrics.json").stat().st_mtime * 1000
    )
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("images: 1000", "images: 2000")
    )
    assert status() == "RUNNING"  # trained longer
    (run / "jobs.json").write_text('[{"stage": "train", "id": "9", "state": "CANCELLED by 0"}]')
    assert status() == "KILLED"


def test_status_of_a_launch_that_never_came_to_train(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def status(*states: str, asked: str = "train") -> str:
        both = dict(zip(("shard", "train"), states, strict=False))
        jobs = [{"stage": stage, "id": "1", "state": state} for stage, state in both.items()]
        (run / "jobs.json").write_text(json.dumps(jobs))
        (run / "config_history.jsonl").write_text(json.dumps({"stages": ["shard", asked]}) + "\n")
        return record.status(run, record.run_config(run))

    assert status("RUNNING") == status("COMPLETED") == "RUNNING"  # the training is still to come
    assert status("FAILED") == status("COMPLETED", "FAILED") == "FAILED"
    assert status("CANCELLED") == "KILLED"
    assert status("COMPLETED", "RUNNING") == "RUNNING"
    assert status("COMPLETED", asked="classifier") == "FINISHED"
    assert status("FAILED", asked="classifier") == "FAILED"


def test_status_of_a_failed_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "train/done.json").write_text('{"step": 8, "images": 1024, "seconds": 5}')
    (run / "jobs.json").write_text('[{"stage": "eval", "id": "9", "state": "FAILED"}]')
    assert record.status(run, record.run_config(run)) == "FAILED"
    add_eval(run, 1)
    assert record.status(run, record.run_config(run)) == "FINISHED"


def test_disabled_tracking_makes_no_store(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=("tracking.enabled=false",), steps=2)
    sync_run(run)
    assert not (tmp_path / "mlflow.db").exists() and not (run / "mlflow.json").exists()


@pytest.mark.parametrize("error", [PermissionError("/proc/mlruns"), ImportError("No module named 'boto3'")])
def test_a_store_that_takes_no_files_gets_every_number_and_the_state(
    runs: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from mlflow.tracking import MlflowClient

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    name = f"no_files_{type(error).__name__}"
    run = make_run(runs, name, (f"tracking.experiment={name}",), steps=5, evals=1, step=90)
    (run / "train/done.json").write_text('{"step": 8, "images": 1024, "seconds": 5}')
    with monkeypatch.context() as patch:
        for method in ("log_text", "log_artifact"):
            patch.setattr(MlflowClient, method, refuse)
        with pytest.raises(TrackingError, match=f"holds all numbers, but no files.*{error}.*sync_mlflow.py"):
            tracker_of(run).push()
    store = client(runs)
    parent = parent_of(store, name)
    (child,) = [r for r in runs_of(store, name) if r.info.run_id != parent.info.run_id]
    assert_holds_file_once(store, parent.info.run_id, run)
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.metrics["eval/other/mse"] == child.data.metrics["eval/other/mse"]
    tracker_of(run).push()
    assert {file.path for file in store.list_artifacts(child.info.run_id)} == {"metrics.json", "samples"}


def test_files_are_not_sent_to_a_runs_folder_that_is_gone(tmp_path: Path, with_store: None) -> None:
    run = make_run(tmp_path, steps=3)
    tracker_of(run).push()
    (tmp_path / "_shared").mkdir()
    moved = tmp_path.parent / f"{tmp_path.name}_moved"
    tmp_path.rename(moved)
    add_metrics(moved / run.name, range(4, 6))
    said = f"all numbers, but no files: it keeps them in {tmp_path}, which is gone"
    with pytest.raises(TrackingError, match=said):
        tracker_of(moved / run.name).push()
    assert_holds_file_once(client(moved), parent_of(client(moved), "cvae").info.run_id, moved / run.name)
    assert not tmp_path.exists()


def test_an_evaluation_by_hand_is_sent_by_rank_0(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs, "hand", ("tracking.experiment=hand",), steps=5, evals=1, step=90)
    monkeypatch.setattr(command, "run_stage", lambda *_, **__: None)  # it has left the files above
    monkeypatch.setattr("sys.argv", ["pipeline.run", str(run), "eval"])
    monkeypatch.setenv("RANK", "1")
    command.main()
    assert not (run / "mlflow.json").exists()
    monkeypatch.setenv("RANK", "0")
    command.main()
    assert "hand eval 1 (test, N=3000)" in {r.info.run_name for r in runs_of(client(runs), "hand")}


def test_the_parent_shows_no_number_of_an_earlier_evaluation(runs: Path) -> None:
    run = make_run(runs, "fewer", ("tracking.experiment=fewer",), steps=5, evals=1, step=90)
    tracker_of(run).push()
    file = add_eval(run, 2, fd=30.0) / "metrics.json"
    tree = json.loads(file.read_text())
    del tree["metrics"]["mse"]
    file.write_text(json.dumps(tree))
    for _ in range(2):
        tracker_of(run).push()
    shown = parent_of(client(runs), "fewer").data.metrics
    assert shown["distance"] == 30.0 and math.isnan(shown["eval/other/mse"])
    history = client(runs).get_metric_history(parent_of(client(runs), "fewer").info.run_id, "eval/other/mse")
    assert len(history) == 2  # the number and that it is gone, however often it is sent


def test_a_number_given_again_is_another_child(runs: Path) -> None:
    run = make_run(runs, "again", ("tracking.experiment=again",), steps=5, evals=1, step=90)
    tracker_of(run).push()
    for fd in (30.0, 40.0):
        shutil.rmtree(run / "eval")
        add_eval(run, 1, fd=fd)
        for _ in range(2):
            tracker_of(run).push()
    children = [r for r in runs_of(client(runs), "again") if "mlflow.parentRunId" in r.data.tags]
    rows = [(r.data.metrics["distance"], r.info.run_name, r.data.tags["eval_number"]) for r in children]
    name = "again eval 1 (test, N=3000)"
    assert sorted(rows) == [
        (21.5, f"{name} (removed)", "1 (removed)"),
        (30.0, f"{name} (removed)", "1 (removed)"),
        (40.0, name, "1"),
    ]

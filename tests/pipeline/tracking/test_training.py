"""A training leaves everything in MLflow once, however often it is sent."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pipeline.tracking.sync as sync_module
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.rundir.record import run_config
from pipeline.tracking.base import TrackingError
from pipeline.tracking.mlflow import store as mlflow_store
from pipeline.tracking.mlflow.view import TAG
from pipeline.tracking.sync import sync_beside, sync_run, tracker_of
from tests.fake_run import add_eval, add_metrics, make_run, png, train_values
from tests.pipeline.tracking.in_store import assert_holds_file_once, client, parent_of, runs_of


def test_two_processes_on_a_fresh_store(runs: Path) -> None:
    store = client(runs)
    found = {r.info.run_name: r.info.run_id for r in runs_of(store, "first")}
    assert sorted(found) == ["first_0", "first_1"]
    for name, run_id in found.items():
        assert_holds_file_once(store, run_id, runs / name)
    assert store.get_experiment_by_name("first").artifact_location.startswith("file:///")


def test_everything_once_however_often(runs: Path) -> None:
    run = make_run(runs, "often", ("tracking.experiment=often", "name=paper", "seed=3"), steps=40)
    (run / "config_history.jsonl").write_text('{"step": 0, "commit": "abc123"}\n')
    job = {"stage": "train", "id": "17", "state": "TIMEOUT"}
    (run / "jobs.json").write_text(
        json.dumps([job, job | {"state": "RUNNING"}, job | {"id": "18", "state": "PENDING"}])
    )
    tracker_of(run).push()
    add_metrics(run, range(41, 61))
    feeder = tracker_of(run)
    for _ in range(3):
        feeder.push()
    sync_run(run)
    store = client(runs)
    parent = parent_of(store, "often")
    assert_holds_file_once(store, parent.info.run_id, run)
    assert 7 not in {
        m.step for m in store.get_metric_history(parent.info.run_id, "train/grad_norm")
    }  # it was inf
    assert (
        parent.data.params["train.batch_size"] == "64"
        and parent.data.params["model.net.channels"] == "[32, 64, 128, 256]"
    )
    absent = ("cluster", "tracking", "refine", "tune", "model.residual", "model.prior.flow_matching")
    assert not [key for key in parent.data.params if key.startswith(absent)]
    assert "model.prior.flow.layers" in parent.data.params and len(parent.data.params) < 100
    wanted = {
        "variant": "paper",
        "seed": "3",
        "mlflow.source.git.commit": "abc123",
        "stage.train": "PENDING",
        "jobs.train": "17 18",
    }
    assert wanted.items() <= parent.data.tags.items()
    assert [f.path for f in store.list_artifacts(parent.info.run_id)] == ["config.yaml"]


def test_runs_sent_beside_the_caller_are_there_after_the_block(runs: Path) -> None:
    run = make_run(runs, "beside", ("tracking.experiment=beside",), steps=5)
    broken = make_run(
        runs, "beside broken", ("tracking.experiment=beside", "tracking.uri=sqlite:////dev/null/x")
    )
    with sync_beside() as sync:
        sync(broken)  # a warning, and the next one is sent
        sync(run)
    assert_holds_file_once(client(runs), parent_of(client(runs), "beside").info.run_id, run)


@pytest.mark.parametrize("again", [False, True])
def test_a_stop_waits_for_the_interrupted_run_alone_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, again: bool
) -> None:
    """`again`: Ctrl-C also ends the wait."""
    begun, proceed = threading.Event(), threading.Event()
    sent = []

    def push(run_dir: Path, log: object) -> None:
        begun.set()
        assert proceed.wait(60)
        sent.append(run_dir.name)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            if wait and again:
                raise KeyboardInterrupt
            if wait:
                proceed.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(sync_module, "sync_run", push)
    monkeypatch.setattr(sync_module, "ThreadPoolExecutor", Pool)
    runs = [tmp_path / name for name in ("sending", "new", "queued", "stopped")]
    for run in runs:
        run.mkdir()
        if run.name != "new":
            (run / "jobs.json").write_text("[]")
    with pytest.raises(KeyboardInterrupt), sync_beside() as sync:
        for run in runs:
            sync(run)
        assert begun.wait(60)
        raise KeyboardInterrupt
    proceed.set()
    unsent = ["sending", "queued", "stopped"] if again else ["queued"]
    assert f"sync_mlflow.py {' '.join(str(tmp_path / name) for name in unsent)}`" in caplog.text
    assert again or sent == ["sending", "stopped"]


def test_nodes_stand_under_system_metrics(runs: Path) -> None:
    run = make_run(runs, "nodes", ("tracking.experiment=nodes",), steps=2)
    for host in ("n1", "n2"):
        log = MetricsLog(layout.nodes_dir(run) / f"{host}.jsonl", None)
        log.append(1, {f"system/{host}/cpu_utilization_percentage": 50.0})
        log.close()
    for _ in range(2):
        tracker_of(run).push()
    store = client(runs)
    found = parent_of(store, "nodes")
    named = sorted(name for name in found.data.metrics if name.startswith("system/"))
    assert named == [f"system/{host}/cpu_utilization_percentage" for host in ("n1", "n2")]
    assert len(store.get_metric_history(found.info.run_id, named[0])) == 1


def test_the_view_of_people_is_left_as_it_is(runs: Path) -> None:
    run = make_run(runs, "viewed", ("tracking.experiment=viewed",), steps=1)
    tracker_of(run).push()
    store = client(runs)
    experiment = store.get_experiment_by_name("viewed")
    state = json.loads(json.loads(experiment.tags[TAG])["state"])
    assert [chart["metricKey"] for chart in state["compareRunCharts"]][0] == "distance"
    store.set_experiment_tag(experiment.experiment_id, TAG, "mine")
    tracker_of(run).push()
    assert store.get_experiment_by_name("viewed").tags[TAG] == "mine"


def test_a_pass_that_dies_half_way_is_completed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs, "half", ("tracking.experiment=half",), steps=30)
    monkeypatch.setattr(mlflow_store, "METRICS_PER_BATCH", 50)
    from mlflow.tracking import MlflowClient

    sent, log_batch = [], MlflowClient.log_batch

    def dying(self: Any, run_id: str, metrics: Any = (), **more: Any) -> None:
        log_batch(self, run_id, metrics=metrics, **more)
        sent.append(len(metrics))
        if len([n for n in sent if n]) == 3:
            raise OSError("connection reset after the server had written the batch")

    monkeypatch.setattr(MlflowClient, "log_batch", dying)
    feeder = tracker_of(run)
    with pytest.raises(TrackingError, match="connection reset"):
        feeder.push()
    store = client(runs)
    assert 0 < len(store.get_metric_history(parent_of(store, "half").info.run_id, "train/loss")) < 30
    feeder.push()
    assert max(sent) <= 50
    assert_holds_file_once(store, parent_of(store, "half").info.run_id, run)


def test_crash_between_creating_and_noting_does_not_double_the_run(runs: Path) -> None:
    run = make_run(runs, "crash", ("tracking.experiment=crash",), steps=2)
    tracker_of(run).push()
    note = json.loads((run / "mlflow.json").read_text())
    (run / "mlflow.json").write_text(json.dumps({"run_dir_id": note["run_dir_id"]}))
    tracker_of(run).push()
    assert len(runs_of(client(runs), "crash")) == 1
    assert json.loads((run / "mlflow.json").read_text())["run_id"] == note["run_id"]


def test_resumed_training_adds_only_what_is_new(runs: Path) -> None:
    run = make_run(runs, "resumed", ("tracking.experiment=resumed",), steps=25)
    tracker_of(run).push()
    log = MetricsLog(run / "train/metrics.jsonl", 20)  # killed at 25, the checkpoint was at 20
    for step in range(21, 31):
        log.append(step, train_values(step) | {"train/grad_norm": 0.0})
    log.close()
    tracker_of(run).push()
    store = client(runs)
    history = store.get_metric_history(parent_of(store, "resumed").info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(1, 31))


def test_changed_parameters_become_tags(runs: Path) -> None:
    run = make_run(runs, "changed", ("tracking.experiment=changed",), steps=1)
    tracker_of(run).push()
    original = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(original.replace("images: 1000", "images: 2000"))
    tracker_of(run).push()
    parent = parent_of(client(runs), "changed")
    assert parent.data.params["train.images"] == "1000" and parent.data.tags["changed.train.images"] == "2000"
    assert [key for key in parent.data.tags if key.startswith("changed.")] == ["changed.train.images"]
    (run / "config.yaml").write_text(original)
    tracker_of(run).push()
    assert parent_of(client(runs), "changed").data.tags["changed.train.images"] == "1000"


@pytest.mark.usefixtures("with_store")
@pytest.mark.parametrize("late", [False, True])
def test_a_doubled_request_leaves_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """The client repeats a create request whose answer was late; the double appears at once, or later."""
    from mlflow.tracking import MlflowClient

    run, create, again = make_run(tmp_path, steps=3), MlflowClient.create_run, []
    add_eval(run, 1)

    def create_twice(client: MlflowClient, *args: Any) -> Any:
        again.append(args)
        if not late:
            create(client, *args)
        return create(client, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", create_twice)
        tracker_of(run).push()
    store = mlflow_store.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    for args in again if late else ():
        store.create_run(*args)
    tracker_of(run).push()
    found = store.search_runs([again[0][0]])
    assert len(again) == len(found) == 2 and all(r.data.params for r in found)  # the run, and its evaluation
    (parent,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    assert len(store.get_metric_history(parent.info.run_id, "train/loss")) == 3


@pytest.mark.usefixtures("with_store")
def test_samples_of_fixed_noise_become_one_image_per_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=3)
    folder = run / "train/samples"
    folder.mkdir()
    for step in (10, 20):
        (folder / f"step_{step:08d}.png").write_bytes(png(step))
        for _ in range(2):
            tracker_of(run).push()
    store = mlflow_store.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    parent = parent_of(store, "cvae")
    names = [
        file.path for file in store.list_artifacts(parent.info.run_id, "images") if file.path.endswith(".png")
    ]
    assert sorted(int(re.fullmatch(r"images/samples[+%]step[+%](\d+)[+%].*", name)[1]) for name in names) == [
        10,
        20,
    ]


def test_an_experiment_opens_as_a_table_of_runs(runs: Path) -> None:
    """MLflow shows traces of language models unless the experiment says what it is."""
    store = client(runs)
    store.create_experiment("kind_old")
    for name in ("kind_new", "kind_old"):
        tracker_of(make_run(runs, name, (f"tracking.experiment={name}",), steps=1)).push()
        found = store.get_experiment_by_name(name)
        assert found.tags["mlflow.experimentKind"] == "custom_model_development"


def test_curves_of_later_phases_have_names_of_their_own(runs: Path) -> None:
    run = make_run(runs, "phases", ("tracking.experiment=phases",), steps=2)
    (run / "refine").mkdir()
    values = {"train/loss": 3.0, "val_ema/loss": 2.0}
    line = {"step": 7, "time": 1.7e9, "values": values}
    (run / "refine/metrics.jsonl").write_text(json.dumps(line) + "\n")
    for _ in range(2):
        tracker_of(run).push()
    found = parent_of(client(runs), "phases")
    assert (found.data.metrics["refine/loss"], found.data.metrics["refine_val_ema/loss"]) == (3.0, 2.0)
    assert len(client(runs).get_metric_history(found.info.run_id, "refine/loss")) == 1
    assert len(client(runs).get_metric_history(found.info.run_id, "train/loss")) == 2


def test_the_shards_are_the_data_set_and_the_logs_lie_beside_the_report(runs: Path) -> None:
    run = make_run(runs, "inputs", ("tracking.experiment=inputs",), steps=2)
    tracker_of(run).push()  # there are no shards yet
    config = run_config(run)
    folder = layout.shards_dir(config)
    folder.mkdir(parents=True)
    manifest = {"content_digest": "ab" * 32, "size": 64, "attributes": ["Male", "Young"]}
    manifest["splits"] = {"train": {"shards": [{"samples": 30}, {"samples": 12}]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (run / "train/done.json").write_text('{"step": 8, "images": 1024}')
    (run / "logs/train").mkdir(parents=True)
    (run / "logs/train/rank0.log").write_text("step 1 http://ada:secret@host\n")
    for _ in range(2):
        tracker_of(run).push()
    found = parent_of(client(runs), "inputs")
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("toy_faces_64px", ("ab" * 32)[:36])
    assert json.loads(data.dataset.profile)["images"] == {"train": 42}
    assert [f.path for f in client(runs).list_artifacts(found.info.run_id, "logs/train")] == [
        "logs/train/rank0.log"
    ]
    place = Path(found.info.artifact_uri.removeprefix("file://").replace("%20", " ").replace("%27", "'"))
    text = (place / "logs/train/rank0.log").read_text()
    assert "step 1" in text and "secret" not in text

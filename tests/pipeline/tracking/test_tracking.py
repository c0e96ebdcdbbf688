"""metrics.jsonl survives resumes and crashes; MLflow gets everything once, and can stop nothing."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, exit_code
from pipeline.rundir import files
from pipeline.rundir.metrics_log import MetricsLog, read_metrics
from pipeline.rundir.redact import redact
from pipeline.runtime.ports import free_port
from pipeline.tracking import mlflow_store, mlflow_sync
from pipeline.tracking.mlflow_store import TrackingError
from pipeline.tracking.mlflow_sync import Feeder
from pipeline.tracking.sync import LiveSync, sync_run
from tests.conftest import ROOT
from tests.fake_run import add_eval, add_metrics, make_run, png, train_values


def steps(path: Path) -> list[int]:
    return [r["step"] for r in read_metrics(path)]


# ---- metrics.jsonl


def test_resume_cuts_later_and_half_written_records(tmp_path: Path) -> None:
    path = tmp_path / "train/metrics.jsonl"
    log = MetricsLog(path, None)
    for step in range(1, 6):
        log.append(step, {"train/loss": step / 3})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "time": 1.0, "values": {"train/lo')
    assert steps(path) == [1, 2, 3, 4, 5]
    log = MetricsLog(path, 3)
    log.append(4, {"train/loss": -1.0})
    assert [(r["step"], r["values"]["train/loss"]) for r in read_metrics(path)] == [
        (1, 1 / 3),
        (2, 2 / 3),
        (3, 1.0),
        (4, -1.0),
    ]
    log.close()


def test_fresh_start_forgets_records_of_a_training_without_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, None).append(1, {"a": 1.0})
    MetricsLog(path, None).close()
    assert read_metrics(path) == []


def test_a_record_cut_at_a_number_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "time": 1.0, "values": {"a": 123}}'
    path.write_text(
        whole + "\n" + whole.replace('"step": 1', '"step": 2')
    )  # complete JSON, but no newline yet
    assert steps(path) == [1]


def test_non_finite_values_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    log.append(1, {"a": math.nan, "b": -math.inf, "c": 2.0})
    log.sync()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["values"] == {
        "a": "nan",
        "b": "-inf",
        "c": 2.0,
    }
    values = read_metrics(path)[0]["values"]
    assert math.isnan(values["a"]) and values["b"] == -math.inf and values["c"] == 2.0
    log.close()


def test_damage_in_the_middle_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1, "values": {}}\nrubbish\n{"step": 2, "time": 1, "values": {}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_cut_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    log.append(1, {"a": 1.0})
    log.append(2, {"a": 1.0})
    log.close()
    before = path.read_bytes()

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, 1)
    assert path.read_bytes() == before


# ---- MLflow with SQLite


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory whose store two processes opened, fresh, at the same time, through the command line."""
    folder = tmp_path_factory.mktemp("runs with 'space")
    made = [make_run(folder, f"first_{i}", ("tracking.experiment=first",), steps=3) for i in range(2)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    command = [sys.executable, "tools/sync_mlflow.py"]
    started = [
        subprocess.Popen([*command, str(run)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        for run in made
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


def client(runs_dir: Path) -> Any:
    return mlflow_store.open_client(f"sqlite:///{runs_dir}/mlflow.db")


def runs_of(store: Any, experiment: str) -> list[Any]:
    return store.search_runs([store.get_experiment_by_name(experiment).experiment_id])


def parent_of(store: Any, experiment: str) -> Any:
    (parent,) = [r for r in runs_of(store, experiment) if "mlflow.parentRunId" not in r.data.tags]
    return parent


def assert_holds_file_once(store: Any, run_id: str, run_dir: Path) -> None:
    """Every finite value of metrics.jsonl is in the store exactly once, with its own time."""
    wanted: dict[str, Counter] = {}
    for record in read_metrics(run_dir / "train/metrics.jsonl"):
        for name, value in record["values"].items():
            if math.isfinite(value):
                wanted.setdefault(name, Counter())[record["step"], value, int(record["time"] * 1000)] += 1
    assert wanted
    for name, points in wanted.items():
        assert (
            Counter((m.step, m.value, m.timestamp) for m in store.get_metric_history(run_id, name)) == points
        ), name


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
    Feeder(run).push()
    add_metrics(run, range(41, 61))
    feeder = Feeder(run)
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
    assert not [key for key in parent.data.params if key.startswith(("cluster", "tracking"))]
    wanted = {
        "variant": "paper",
        "seed": "3",
        "mlflow.source.git.commit": "abc123",
        "stage.train": "PENDING",
        "jobs.train": "17 18",
    }
    assert wanted.items() <= parent.data.tags.items()
    assert [f.path for f in store.list_artifacts(parent.info.run_id)] == ["config.yaml"]


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
    feeder = Feeder(run)
    with pytest.raises(TrackingError, match="connection reset"):
        feeder.push()
    store = client(runs)
    assert 0 < len(store.get_metric_history(parent_of(store, "half").info.run_id, "train/loss")) < 30
    feeder.push()
    assert max(sent) <= 50
    assert_holds_file_once(store, parent_of(store, "half").info.run_id, run)


def test_crash_between_creating_and_noting_does_not_double_the_run(runs: Path) -> None:
    run = make_run(runs, "crash", ("tracking.experiment=crash",), steps=2)
    Feeder(run).push()
    note = json.loads((run / "mlflow.json").read_text())
    (run / "mlflow.json").write_text(json.dumps({"run_dir_id": note["run_dir_id"]}))
    Feeder(run).push()
    assert len(runs_of(client(runs), "crash")) == 1
    assert json.loads((run / "mlflow.json").read_text())["run_id"] == note["run_id"]


def test_resumed_training_adds_only_what_is_new(runs: Path) -> None:
    run = make_run(runs, "resumed", ("tracking.experiment=resumed",), steps=25)
    Feeder(run).push()
    log = MetricsLog(run / "train/metrics.jsonl", 20)  # killed at 25, the checkpoint was at 20
    for step in range(21, 31):
        log.append(step, train_values(step) | {"train/grad_norm": 0.0})
    log.close()
    Feeder(run).push()
    store = client(runs)
    history = store.get_metric_history(parent_of(store, "resumed").info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(1, 31))


def test_changed_parameters_become_tags(runs: Path) -> None:
    run = make_run(runs, "changed", ("tracking.experiment=changed",), steps=1)
    Feeder(run).push()
    original = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(original.replace("images: 1000", "images: 2000"))
    Feeder(run).push()
    parent = parent_of(client(runs), "changed")
    assert parent.data.params["train.images"] == "1000" and parent.data.tags["changed.train.images"] == "2000"
    assert [key for key in parent.data.tags if key.startswith("changed.")] == ["changed.train.images"]
    (run / "config.yaml").write_text(original)
    Feeder(run).push()
    assert parent_of(client(runs), "changed").data.tags["changed.train.images"] == "1000"


def test_evaluations_are_children_and_head_the_parent(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs, "evals", ("tracking.experiment=evals", "name=paper"), steps=5, evals=1, step=90)
    (run / "eval/2").mkdir()  # not complete
    from mlflow.tracking import MlflowClient

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", crash)
        with pytest.raises(TrackingError, match="disk full"):
            Feeder(run).push()
    (run / "report.html").write_text("<html></html>")
    for _ in range(2):
        Feeder(run).push()
    store = client(runs)
    parent = parent_of(store, "evals")
    (child,) = [r for r in runs_of(store, "evals") if r.info.run_id != parent.info.run_id]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.info.run_name, child.info.status, child.data.tags["variant"]) == (
        "eval_1",
        "FINISHED",
        "paper",
    )
    assert child.data.params["split"] == "test" and child.data.params["n"] == "3000"
    wanted = {
        "fd_classifier_samples": 21.5,
        "fd_classifier_samples_low": 21.0,
        "fd_classifier_samples_high": 22.0,
    }
    wanted |= {"ceiling.attribute_accuracy": 0.95, "floor.attribute_accuracy": 0.6}
    assert wanted.items() <= child.data.metrics.items()
    assert len(store.get_metric_history(child.info.run_id, "mse")) == 1
    assert {f.path for f in store.list_artifacts(child.info.run_id)} == {"metrics.json", "samples"}
    headline = store.get_metric_history(parent.info.run_id, "test/fd_classifier_samples")
    assert [(m.step, m.value) for m in headline] == [(90, 21.5)]
    assert {f.path for f in store.list_artifacts(parent.info.run_id)} == {
        "config.yaml",
        "report.html",
        "eval_1",
    }
    assert len(store.list_artifacts(parent.info.run_id, "eval_1")) == 2

    later = add_eval(run, 3, step=90, fd=20.0) / "metrics.json"  # again, on the same checkpoint
    os.utime(later, (later.stat().st_atime, later.stat().st_mtime + 60))
    for _ in range(2):
        Feeder(run).push()
    assert parent_of(store, "evals").data.metrics["test/fd_classifier_samples"] == 20.0
    assert len(store.get_metric_history(parent.info.run_id, "test/fd_classifier_samples")) == 2
    assert len(store.get_metric_history(parent.info.run_id, "test/mse")) == 1
    assert sorted(r.info.run_name for r in runs_of(store, "evals")) == ["eval_1", "eval_3", "evals"]


def test_status_follows_the_files(runs: Path) -> None:
    run = make_run(runs, "status", ("tracking.experiment=status",), steps=1)
    store = client(runs)

    def status() -> str:
        Feeder(run).push()
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


def test_disabled_tracking_makes_no_store(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=("tracking.enabled=false",), steps=2)
    sync_run(run)
    assert not (tmp_path / "mlflow.db").exists() and not (run / "mlflow.json").exists()


# ---- MLflow over HTTP


@pytest.fixture(scope="module")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server` on a copy of the initialised store."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(runs / "mlflow.db", folder / "mlflow.db")
    address = f"127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    log = open(folder / "log", "w")
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    try:
        give_up = time.monotonic() + 90
        while not healthy(address):
            assert process.poll() is None and time.monotonic() < give_up, (folder / "log").read_text()
            threading.Event().wait(0.1)
        yield f"http://{address}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        log.close()


def healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"http://{address}/health", timeout=1).status == 200
    except OSError:
        return False


def test_live_feed_of_a_real_server(server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_password = server.replace("://", "://ada:secret@")
    run = make_run(tmp_path, overrides=(f"tracking.uri={with_password}", "tracking.experiment=live"), steps=9)
    live = LiveSync(run, interval_s=0.05)
    add_metrics(run, range(11, 20))
    live.stop(timeout_s=120)
    store = mlflow_store.open_client(server)
    parent = parent_of(store, "live")
    assert_holds_file_once(store, parent.info.run_id, run)
    assert parent.info.status == "RUNNING"
    (run / "train/done.json").write_text('{"step": 40, "images": 1024}')
    add_eval(run, 1)
    sync_run(run)
    sync_run(run)
    assert_holds_file_once(store, parent.info.run_id, run)
    assert parent_of(store, "live").info.status == "FINISHED" and len(runs_of(store, "live")) == 2
    config = Path(store.download_artifacts(parent.info.run_id, "config.yaml", str(tmp_path))).read_text()
    assert server.split("//")[1] in config and "secret" not in config + (
        run / "mlflow.json"
    ).read_text() + str(parent.data.tags)
    assert not caplog.records


def test_a_run_without_a_server_ends_up_as_one_with_it(server: str, tmp_path: Path) -> None:
    """Same files, one fed live, one sent twice afterwards: every metric, parameter and tag is the same, and there once."""
    found = []
    for name, uri in (("same_live", server), ("same_outage", f"http://127.0.0.1:{free_port()}")):
        run = make_run(
            tmp_path / name, "same", (f"tracking.uri={uri}", f"tracking.experiment={name}"), steps=12
        )
        live = LiveSync(run, interval_s=0.05)
        add_metrics(run, range(13, 25))
        (run / "train/done.json").write_text('{"step": 24, "images": 1024}')
        live.stop(timeout_s=120)
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(uri, server))  # it is back
        for _ in range(2):
            Feeder(run).push()
        store = mlflow_store.open_client(server)
        parent = parent_of(store, name)
        series = {
            m: sorted((p.step, p.value) for p in store.get_metric_history(parent.info.run_id, m))
            for m in parent.data.metrics
        }
        own = ("run_dir", "run_dir_id", "mlflow.user", "mlflow.source.name")
        tags = {key: value for key, value in parent.data.tags.items() if key not in own}
        found.append((series, parent.data.params, tags, parent.info.status))
    assert found[0] == found[1] and len(found[0][0]["train/loss"]) == 24


@pytest.mark.usefixtures("with_store")
@pytest.mark.parametrize("late", [False, True])
def test_a_doubled_request_leaves_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """The client sends a create request again whose answer was late: the double appears at once, or after the run was written."""
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
        Feeder(run).push()
    store = mlflow_store.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    for args in again if late else ():
        store.create_run(*args)
    Feeder(run).push()
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
            Feeder(run).push()
    store = mlflow_store.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    parent = parent_of(store, "cvae")
    names = [
        file.path for file in store.list_artifacts(parent.info.run_id, "images") if file.path.endswith(".png")
    ]
    assert sorted(int(re.fullmatch(r"images/samples[+%]step[+%](\d+)[+%].*", name)[1]) for name in names) == [
        10,
        20,
    ]


def test_dead_server_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://ada:secret@127.0.0.1:{free_port()}"
    run = make_run(tmp_path, overrides=(f"tracking.uri={uri}",), steps=2)
    sync_run(run)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("cvae")]
    assert f"python tools/sync_mlflow.py {run}" in record.message and "http://***@127.0.0.1" in record.message
    assert "secret" not in caplog.text
    caplog.clear()
    live = LiveSync(run, interval_s=0.01)
    live.stop(timeout_s=60)
    assert [r.name for r in caplog.records if r.name.startswith("cvae")] == ["cvae.tracking"]


def test_a_server_that_never_answers_holds_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and says nothing
        run = make_run(
            tmp_path, overrides=(f"tracking.uri=http://127.0.0.1:{mute.getsockname()[1]}",), steps=2
        )
        live = LiveSync(run, interval_s=0.01)
        live.stop(timeout_s=0.5)
        assert "MLflow is slow to answer; `python tools/sync_mlflow.py" in caplog.text


class SlowProxy(ThreadingHTTPServer):
    """Passes every call on to `target`, `delay_s` late."""

    def __init__(self, target: str, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), PassOn)
        self.target, self.delay_s, self.calls = target, delay_s, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class PassOn(BaseHTTPRequestHandler):
    server: SlowProxy

    def do_GET(self) -> None:
        self.server.calls += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        time.sleep(self.server.delay_s)  # the fault itself
        headers = {
            name: value for name, value in self.headers.items() if name in ("Content-Type", "Authorization")
        }
        request = urllib.request.Request(self.server.target + self.path, body, headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with suppress(BrokenPipeError), answer:  # the client may be gone by now
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.end_headers()
            self.wfile.write(content)

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow  # each call takes ten seconds
def test_a_server_that_takes_ten_seconds_for_each_call_holds_nobody_and_is_completed_later(
    server: str, tmp_path: Path
) -> None:
    proxy = SlowProxy(server, 10.0)
    uri = f"http://127.0.0.1:{proxy.server_port}"
    run = make_run(tmp_path, overrides=(f"tracking.uri={uri}", "tracking.experiment=slow"), steps=9)
    script = (
        "import time; from pathlib import Path; from pipeline.tracking.sync import LiveSync;"
        f"live = LiveSync(Path({str(run)!r}), 0.01); time.sleep(25);"
        "start = time.monotonic(); live.stop(5); print(time.monotonic() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and float(done.stdout) < 10 and "MLflow is slow to answer" in done.stderr
    assert 0 < proxy.calls < 10  # it was in the middle of its work when the process ended
    proxy.delay_s = 0.0
    for _ in range(2):
        Feeder(run).push()
    store = mlflow_store.open_client(server)
    assert_holds_file_once(store, parent_of(store, "slow").info.run_id, run)
    proxy.shutdown()
    proxy.server_close()


def test_a_dead_server_is_not_worth_an_import(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=(f"tracking.uri=http://127.0.0.1:{free_port()}",), steps=2)
    script = (
        "import sys; from pathlib import Path; from pipeline.tracking.sync import LiveSync;"
        f"LiveSync(Path({str(run)!r}), 0.01).stop(); print('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "False\n" and "does not answer" in done.stderr, done.stderr


def test_refusing_server_is_asked_a_few_times_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    run = make_run(tmp_path, overrides=(f"tracking.uri=http://127.0.0.1:{httpd.server_port}",), steps=2)
    sync_run(run)
    assert 1 <= len(asked) <= 3 and "403" in caplog.text
    spec = importlib.util.spec_from_file_location("sync_mlflow", ROOT / "tools/sync_mlflow.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["sync_mlflow.py", str(run)])
    assert exit_code(tool.main) == 2
    httpd.shutdown()
    httpd.server_close()


def test_locked_store_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, steps=1)
    monkeypatch.setattr(mlflow_store, "LOCK_TIMEOUT_S", 0.0)
    with mlflow_store.database_lock(f"sqlite:///{tmp_path}/mlflow.db"):
        sync_run(run)
    assert "mlflow.db.lock" in caplog.text and not (tmp_path / "mlflow.db").exists()


@pytest.mark.usefixtures("with_store")
def test_a_database_that_another_program_locks_is_completed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # else a minute
    run = make_run(tmp_path, steps=2)
    Feeder(run).push()
    add_metrics(run, range(3, 6))
    holder = sqlite3.connect(tmp_path / "mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    sync_run(run)
    assert "locked" in caplog.text and f"tools/sync_mlflow.py {run}" in caplog.text
    holder.rollback()
    holder.close()
    Feeder(run).push()
    assert_holds_file_once(client(tmp_path), parent_of(client(tmp_path), "cvae").info.run_id, run)


@pytest.mark.slow  # three processes that import mlflow; the locked database takes the same way through our code
def test_a_full_disk_under_the_store_is_completed_later(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the database cannot grow."""
    run = make_run(tmp_path, steps=2)
    Feeder(run).push()
    add_metrics(run, range(3, 400))
    size = (tmp_path / "mlflow.db").stat().st_size
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    command = [sys.executable, "tools/sync_mlflow.py", str(run)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert failed.returncode == 2 and "nothing is lost" in failed.stderr and "Traceback" not in failed.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    assert_holds_file_once(client(tmp_path), parent_of(client(tmp_path), "cvae").info.run_id, run)


def test_redact() -> None:
    assert (
        redact("API request to https://ada:p%40ss@host:5000/api failed")
        == "API request to https://***@host:5000/api failed"
    )
    assert redact("http://ada:p@ss@host/x") == "http://***@host/x"
    assert redact("sqlite:////runs/a@b.db") == "sqlite:////runs/a@b.db"
    assert mlflow_sync.clean_name("fd 1:2/x?é") == "fd 1:2/x__"

"""MLflow: one run per run directory, one child run per evaluation."""

from __future__ import annotations

import math
import os
import re
import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pipeline.config.load import flatten
from pipeline.config.schema import RunConfig
from pipeline.errors import UserError
from pipeline.rundir import layout, record
from pipeline.rundir.files import write_json
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import Evaluation, read_json
from pipeline.rundir.redact import redact
from pipeline.tracking import mlflow_store
from pipeline.tracking.base import Tracker, TrackingError
from pipeline.tracking.mlflow_evaluations import send_evaluation, send_headline
from pipeline.tracking.mlflow_store import (
    as_text,
    database_file,
    database_lock,
    experiment_name,
    first_line,
    held,
    held_metric,
    is_server,
    open_client,
    runs_dir,
    set_tags,
    store_errors,
    store_uri,
    the_run,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

NOTE = "mlflow.json"  # which run of which store this directory is, and which files were sent
NOT_PARAMETERS = ("cluster.", "tracking.", "runs_dir")
CHANGED = "changed."
_LOGGED_IMAGE = re.compile(r"[+%]step[+%](\d+)[+%].*\.webp$")  # the last file that MLflow writes of an image


class MlflowTracker(Tracker):
    """Feeds an MLflow store; remembers between passes what it holds, so that a live feed stays cheap."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        super().__init__(run_dir, config)
        self.uri = store_uri(config)
        self.live = is_server(self.uri)
        self._known: dict[str, set[int]] = {}  # name of a metric -> its steps in the store
        self._client: MlflowClient
        self._run: Run
        self._children: list[tuple[Evaluation, str]] = []  # evaluations and their run ids

    @property
    def address(self) -> str:
        """Return the store's address."""
        return f"MLflow {redact(self.uri)}"

    @property
    def viewer(self) -> str:
        """Return the address of the server, or the command that starts one."""
        if self.live:
            return redact(self.uri)
        return f"mlflow ui --backend-store-uri {shlex.quote(redact(self.uri))}"

    def require_answer(self) -> None:
        """Raise TrackingError if the store is a server that nobody listens for."""
        if self.live:
            mlflow_store.require_listening(self.uri)

    def problem(self) -> str:
        """Return what is wrong with the server, or with the file of a SQLite store; else ""."""
        if self.live:
            return mlflow_store.server_problem(self.uri)
        file = database_file(self.uri)
        if file is None:
            return ""
        there = next(path for path in (file, *file.parents) if path.exists())
        return "" if os.access(there, os.W_OK) else f"key 'tracking.uri': {there}: cannot be written"

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold the run directory's lock and the database's, and name the store in every error."""
        try:
            with held(self.run_dir / ".mlflow.lock"), database_lock(self.uri):
                yield
        except UserError:
            raise
        except store_errors() as error:
            self._known.clear()  # part of the last batch may have arrived
            raise self._not_updated(first_line(error)) from None

    def _not_updated(self, reason: str) -> TrackingError:
        return TrackingError(
            f"MLflow store {redact(self.uri)} was not updated: {reason}; nothing is lost, "
            f"`python tools/sync_mlflow.py {self.run_dir}` sends it later"
        )

    def start(self) -> None:
        """Find or create the run.

        Its identity is on the disk first, so that a crash in between cannot create it twice.
        """
        self._client = open_client(self.uri)
        name = experiment_name(self.config)
        experiment_id = self._experiment_id(name)
        note = read_json(self.run_dir / NOTE, {})
        if "run_dir_id" not in note:
            note = {"run_dir_id": uuid.uuid4().hex}
            write_json(self.run_dir / NOTE, note)
        identity = {"run_dir_id": note["run_dir_id"]}
        started_ms = int(record.started(self.run_dir) * 1000)
        self._run = the_run(self._client, experiment_id, identity, started_ms, self.run_dir.name)
        here = {"uri": redact(self.uri), "experiment": name, "run_id": self._run.info.run_id}
        if any(note.get(key) != value for key, value in here.items()):
            write_json(self.run_dir / NOTE, {**identity, **here, "sent": {}})

    def _experiment_id(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        if database_file(self.uri):  # MLflow's own default is the working directory
            location = (runs_dir(self.config) / "mlartifacts" / name).as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    def params(self) -> None:
        """Send parameters, and tags.

        MLflow refuses to change a parameter. A value that changed on resume becomes the tag `changed.<key>`.
        """
        params = {}
        for key, value in flatten(self.config).items():
            if not key.startswith(NOT_PARAMETERS):
                params[key] = as_text(value)
        held_params = self._run.data.params
        new = {key: value for key, value in params.items() if key not in held_params}
        mlflow_store.log_params(self._client, self._run.info.run_id, new)
        tags = self._changed(params) | self._identity() | _job_tags(record.jobs(self.run_dir))
        set_tags(self._client, self._run, tags)

    def _changed(self, params: dict[str, str]) -> dict[str, str]:
        held_params = self._run.data.params
        changed = {}
        for key, value in params.items():
            changed_before = CHANGED + key in self._run.data.tags  # it may have changed back
            if changed_before or held_params.get(key, value) != value:
                changed[CHANGED + key] = value
        return changed

    def _identity(self) -> dict[str, str]:
        tags = {
            "variant": self.config.name,
            "seed": str(self.config.seed),
            "run_dir": str(self.run_dir),
        }
        commit = record.commit(self.run_dir)
        if commit:
            tags["mlflow.source.git.commit"] = commit
        return tags

    def metrics(self) -> None:
        """Send training, each evaluation as a child run, and the headline evaluation's numbers on the run."""
        self._send_training()
        evaluations = record.evaluations(self.run_dir)
        self._children = []
        for evaluation in evaluations:
            run_id = send_evaluation(self._client, self._run, self.config.name, evaluation)
            self._children.append((evaluation, run_id))
        newest = record.headline(evaluations)
        if newest:
            send_headline(self._client, self._run, newest)

    def _send_training(self) -> None:
        """Send every (name, step) of metrics.jsonl that the store lacks."""
        from mlflow.entities import Metric

        new = []
        for line in read_metrics(layout.train_dir(self.run_dir) / "metrics.jsonl"):
            step = line["step"]
            for name, value in line["values"].items():
                if name not in self._known:
                    self._known[name] = {m.step for m in held_metric(self._client, self._run, name)}
                if math.isfinite(value) and step not in self._known[name]:
                    new.append(Metric(name, value, int(line["time"] * 1000), step))
        mlflow_store.log_metrics(self._client, self._run.info.run_id, new)
        for metric in new:
            self._known[metric.key].add(metric.step)

    def end(self, status: str) -> None:
        """Set the state: a killed process leaves RUNNING for ever, and a resumed run must be open again."""
        if self._run.info.status == status:
            return
        if status == "RUNNING":
            self._client.update_run(self._run.info.run_id, status="RUNNING")
        else:
            ended_ms = int(record.ended(self.run_dir) * 1000)
            self._client.set_terminated(self._run.info.run_id, status, ended_ms)

    def files(self) -> None:
        """Send config.yaml, report.html, pictures and evaluations, if they changed since they were sent.

        Raises TrackingError that names the folder of files if it cannot be written.
        """
        artifacts = str(self._run.info.artifact_uri)
        self._require_folder(artifacts)
        try:
            self._send_changed_files()
            self._send_progress_pictures()
        except Exception as error:
            # MLflow raises many kinds here: of the disk, of a bucket's library, an ImportError without one.
            raise TrackingError(
                f"MLflow store {redact(self.uri)} holds all numbers, but no files could be sent to "
                f"{redact(artifacts)}: {first_line(error)}; start the server with --serve-artifacts, or give "
                "this machine the right to write there, "
                f"then `python tools/sync_mlflow.py {self.run_dir}` sends them"
            ) from None

    def _require_folder(self, artifacts: str) -> None:
        """Raise TrackingError if a SQLite store keeps its files in a runs folder that is gone."""
        url = urlsplit(artifacts)
        if database_file(self.uri) is None or url.scheme != "file":
            return
        folder = Path(unquote(url.path))
        if len(folder.parents) > 3 and not folder.parents[3].is_dir():
            raise TrackingError(
                f"MLflow store {redact(self.uri)} holds all numbers, but no files: it keeps them in "
                f"{folder.parents[3]}, which is gone (were the runs moved?); a link from there helps"
            )

    def _send_changed_files(self) -> None:
        for file, run_id, folder in self._wanted_files():
            note = read_json(self.run_dir / NOTE)
            stat = file.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
            name = f"{run_id}/{file.relative_to(self.run_dir)}"
            if note["sent"].get(name) == state:
                continue
            if file.name == "config.yaml":
                self._client.log_text(run_id, redact(file.read_text()), file.name)
            elif file.is_dir():
                self._send_folder(run_id, file)
            else:
                self._client.log_artifact(run_id, str(file), folder or None)
            note["sent"][name] = state
            write_json(self.run_dir / NOTE, note)

    def _send_folder(self, run_id: str, folder: Path) -> None:
        """Send the files of a folder one by one: MLflow's `log_artifacts` fails on files of a colleague."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                place = file.parent.relative_to(folder)
                self._client.log_artifact(run_id, str(file), None if place == Path() else str(place))

    def _wanted_files(self) -> Iterator[tuple[Path, str, str]]:
        """Yield (file or folder, run id, folder in the run's artifacts)."""
        parent_id = self._run.info.run_id
        for name in ("config.yaml", "report.html"):
            file = self.run_dir / name
            if file.exists():
                yield file, parent_id, ""
        for evaluation, child_id in self._children:
            yield evaluation.folder, child_id, ""
            for picture in evaluation.pictures:
                yield picture, parent_id, f"eval_{evaluation.number}"

    def _send_progress_pictures(self) -> None:
        """Send samples of fixed noise as images with a step, each once; MLflow shows them with a slider."""
        drawn = layout.progress_pictures(self.run_dir)
        if not drawn:
            return
        from PIL import Image

        run_id = self._run.info.run_id
        there = set()
        for file in self._client.list_artifacts(run_id, "images"):
            found = _LOGGED_IMAGE.search(file.path)
            if found:
                there.add(int(found[1]))
        for step, picture in drawn:
            if step not in there:
                time_ms = int(picture.stat().st_mtime * 1000)
                self._client.log_image(
                    run_id, Image.open(picture), key="samples", step=step, timestamp=time_ms
                )

    def send_table(self, name: str, files: list[Path]) -> None:
        """Keep `files` as artifacts of the one finished run called `name`; the next call replaces them."""
        with database_lock(self.uri):
            client = self._client = open_client(self.uri)
            experiment_id = self._experiment_id(experiment_name(self.config))
            found = client.search_runs([experiment_id], f"run_name = '{name}'", max_results=1)
            run = found[0] if found else client.create_run(experiment_id, run_name=name)
            for file in files:
                client.log_artifact(run.info.run_id, str(file))
            client.set_terminated(run.info.run_id, "FINISHED")


def _job_tags(jobs: list[dict[str, Any]]) -> dict[str, str]:
    """Return state, attempts and job ids of each stage."""
    tags: dict[str, str] = {}
    for job in jobs:
        stage = job.get("stage", "")
        number = str(job.get("id", ""))
        tags[f"stage.{stage}"] = str(job.get("state", ""))
        tags[f"attempts.{stage}"] = str(len(job.get("attempts", [])))
        ids = tags.get(f"jobs.{stage}", "").split()
        if number not in ids:
            ids.append(number)
        tags[f"jobs.{stage}"] = " ".join(ids)
    return tags

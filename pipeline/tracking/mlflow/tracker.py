"""MLflow: one run per run directory, one child run per evaluation."""

from __future__ import annotations

import math
import os
import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.paths import database_file
from pipeline.config.schema import RunConfig
from pipeline.config.used import used
from pipeline.errors import UserError
from pipeline.rundir import record
from pipeline.rundir.files import write_json
from pipeline.rundir.record import Evaluation, read_json
from pipeline.rundir.redact import redact
from pipeline.tracking.address import experiment_name, is_server, runs_dir, store_uri
from pipeline.tracking.base import Tracker, TrackingError
from pipeline.tracking.mlflow import health, view
from pipeline.tracking.mlflow.curves import curve_points
from pipeline.tracking.mlflow.describe import dataset_input, run_note
from pipeline.tracking.mlflow.evaluations import NOTE as DESCRIPTION
from pipeline.tracking.mlflow.evaluations import send_evaluation, send_headline
from pipeline.tracking.mlflow.files import NOTE, FileSender
from pipeline.tracking.mlflow.health import first_line, store_errors
from pipeline.tracking.mlflow.store import (
    as_text,
    database_lock,
    held,
    held_metric,
    log_metrics,
    log_params,
    open_client,
    set_tags,
    the_run,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

CHANGED = "changed."
KIND, KIND_OF_MODELS = "mlflow.experimentKind", "custom_model_development"  # opens the table of runs


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
            health.require_listening(self.uri)

    def problem(self) -> str:
        """Return what is wrong with the server, with the database, or with the file of SQLite; else ""."""
        if self.live:
            return health.server_problem(self.uri)
        file = database_file(self.uri)
        if file is None:
            return health.database_problem(self.uri)
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
        tags = {KIND: KIND_OF_MODELS, view.TAG: view.view_tag()}
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            for tag in tags.keys() - experiment.tags.keys():  # people may have changed the view
                self._client.set_experiment_tag(experiment.experiment_id, tag, tags[tag])
            return str(experiment.experiment_id)
        location = None
        if database_file(self.uri):  # MLflow's own default is the working directory
            location = (runs_dir(self.config) / "mlartifacts" / name).as_uri()
        return str(self._client.create_experiment(name, artifact_location=location, tags=tags))

    def params(self) -> None:
        """Send the parameters in use, the data set, and tags.

        MLflow refuses to change a parameter. A value that changed on resume becomes the tag `changed.<key>`.
        """
        params = {key: as_text(value) for key, value in used(self.config).items()}
        held_params = self._run.data.params
        new = {key: value for key, value in params.items() if key not in held_params}
        log_params(self._client, self._run.info.run_id, new)
        tags = self._changed(params) | self._identity() | _job_tags(record.jobs(self.run_dir))
        set_tags(self._client, self._run, tags)
        self._send_dataset()

    def _send_dataset(self) -> None:
        """Name the shards as the run's data set, once they are there."""
        if self._run.inputs and self._run.inputs.dataset_inputs:
            return
        found = dataset_input(self.config)
        if found:
            self._client.log_inputs(self._run.info.run_id, [found])

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
            "variant": record.variant(self.config),
            "seed": str(self.config.seed),
            "run_dir": str(self.run_dir),
        }
        commit = record.commit(self.run_dir)
        if commit:
            tags["mlflow.source.git.commit"] = commit
        return tags

    def metrics(self) -> None:
        """Send training, each evaluation as a child run, and the headline evaluation's numbers on the run."""
        self._send_curves()
        evaluations = record.evaluations(self.run_dir)
        self._children = []
        for evaluation in evaluations:
            run_id = send_evaluation(self._client, self._run, record.variant(self.config), evaluation)
            self._children.append((evaluation, run_id))
        newest = record.headline(evaluations)
        if newest:
            send_headline(self._client, self._run, newest)
        info = self._run.info
        others = view.view_address(info.experiment_id)
        place = f"#/experiments/{info.experiment_id}/runs/{info.run_id}/artifacts"
        note = run_note(self.config, self.run_dir, place, others, newest)
        set_tags(self._client, self._run, {DESCRIPTION: note})

    def _send_curves(self) -> None:
        """Send every (name, step) of the run's records that the store lacks."""
        from mlflow.entities import Metric

        new = []
        for step, time_s, name, value in curve_points(self.run_dir):
            if name not in self._known:
                self._known[name] = {m.step for m in held_metric(self._client, self._run, name)}
            if math.isfinite(value) and step not in self._known[name]:
                new.append(Metric(name, value, int(time_s * 1000), step))
        log_metrics(self._client, self._run.info.run_id, new)
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
        """Send config.yaml, report.html, pictures, evaluations and logs, as far as they changed.

        Raises TrackingError that names the folder of files if it cannot be written.
        """
        sender = FileSender(self._client, self._run, self.run_dir, self.uri)
        ended = record.status(self.run_dir, self.config) != "RUNNING"
        sender.send(self._children, with_logs=ended)

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

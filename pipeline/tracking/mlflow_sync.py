"""Bring an MLflow store up to what a run directory holds; running it again changes nothing."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.load import digest, flatten
from pipeline.config.schema import RunConfig
from pipeline.errors import UserError
from pipeline.rundir import layout, record
from pipeline.rundir.files import write_json
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import Evaluation, read_json
from pipeline.rundir.redact import redact
from pipeline.tracking.mlflow_store import (
    TrackingError,
    as_text,
    clean_name,
    database_lock,
    held,
    log_metrics,
    log_params,
    open_client,
    runs_dir,
    set_tags,
    store_errors,
    tracking_uri,
)  # fmt: skip

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

_LOGGED_IMAGE = re.compile(r"[+%]step[+%](\d+)[+%].*\.webp$")  # the last file that MLflow writes of an image


@dataclass
class Feeder:
    """Feeds one run directory to its store; remembers between calls what the store holds, so that a live feed stays cheap."""

    run_dir: Path
    known: dict[str, set[int]] = field(default_factory=dict)  # metric name -> steps in the store

    def push(self) -> None:
        """One complete pass; raises TrackingError where the store cannot be reached or refuses."""
        config = record.run_config(self.run_dir)
        if not config.tracking.enabled:
            return
        uri = tracking_uri(config)
        try:
            with held(self.run_dir / ".mlflow.lock"), database_lock(uri):
                self._push(config, uri)
        except UserError:
            raise
        except store_errors() as error:
            self.known.clear()  # how much of the last batch arrived is not known
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrackingError(
                f"MLflow store {redact(uri)} was not updated: {redact(first)[:300]}; nothing is lost, "
                f"`python tools/sync_mlflow.py {self.run_dir}` sends it later"
            ) from None

    def _push(self, config: RunConfig, uri: str) -> None:
        client = open_client(uri)
        run = _find_or_create(client, config, self.run_dir, uri)
        run_id = run.info.run_id
        _send_config(client, run, config, self.run_dir)
        self._send_training(client, run)
        evaluations = record.evaluations(self.run_dir)
        for evaluation in evaluations:
            _send_evaluation(client, run, config.name, evaluation)
        if newest := record.headline(evaluations):
            _send_headline(client, run, newest)
        self._send_artifacts(client, run_id, evaluations)
        _send_growth(client, run_id, self.run_dir)
        _send_status(client, run, record.status(self.run_dir, config), self.run_dir)

    def _send_training(self, client: MlflowClient, run: Run) -> None:
        """Every (name, step) of metrics.jsonl that the store lacks."""
        from mlflow.entities import Metric

        records = read_metrics(layout.train_dir(self.run_dir) / "metrics.jsonl")
        new = []
        for line in records:
            for name, value in line["values"].items():
                if name not in self.known:
                    self.known[name] = {m.step for m in _held(client, run, name)}
                if math.isfinite(value) and line["step"] not in self.known[name]:
                    new.append(Metric(name, value, int(line["time"] * 1000), line["step"]))
        log_metrics(client, run.info.run_id, new)
        for metric in new:
            self.known[metric.key].add(metric.step)

    def _send_artifacts(self, client: MlflowClient, run_id: str, evaluations: list[Evaluation]) -> None:
        """config.yaml, report.html and the pictures of each evaluation, where they changed since they were sent."""
        wanted = {self.run_dir / name: "" for name in ("config.yaml", "report.html")}
        wanted |= {picture: f"eval_{e.number}" for e in evaluations for picture in e.pictures}
        note = read_json(self.run_dir / "mlflow.json")
        for file, folder in wanted.items():
            if not file.exists():
                continue
            stat = f"{file.stat().st_size} {file.stat().st_mtime_ns}"
            name = str(file.relative_to(self.run_dir))
            if note["sent"].get(name) == stat:
                continue
            if name == "config.yaml":
                client.log_text(run_id, redact(file.read_text()), name)
            else:
                client.log_artifact(run_id, str(file), folder or None)
            note["sent"][name] = stat
            write_json(self.run_dir / "mlflow.json", note)


def _send_growth(client: MlflowClient, run_id: str, run_dir: Path) -> None:
    """Samples of fixed noise as images with a step, which MLflow shows with a slider; each step once."""
    drawn = layout.progress_pictures(run_dir)
    if not drawn:
        return
    from PIL import Image

    names = [_LOGGED_IMAGE.search(file.path) for file in client.list_artifacts(run_id, "images")]
    there = {int(name[1]) for name in names if name}
    for step, file in drawn:
        if step not in there:
            client.log_image(
                run_id, Image.open(file), key="samples", step=step, timestamp=int(file.stat().st_mtime * 1000)
            )


def send_files(config: RunConfig, name: str, files: list[Path]) -> None:
    """Keep `files` as artifacts of the one finished run called `name`; sent again they are replaced."""
    uri = tracking_uri(config)
    with database_lock(uri):
        client = open_client(uri)
        experiment_id = _experiment(client, config, uri)
        found = client.search_runs([experiment_id], f"run_name = '{name}'", max_results=1)
        run_id = (found[0] if found else client.create_run(experiment_id, run_name=name)).info.run_id
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, "FINISHED")


def _experiment(client: MlflowClient, config: RunConfig, uri: str) -> str:
    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = (runs_dir(config) / "mlartifacts" / name).as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=location))


def _find_or_create(client: MlflowClient, config: RunConfig, run_dir: Path, uri: str) -> Run:
    """The store's run of this directory; its identity is noted on disk first, so a crash in between cannot double it."""
    name, experiment_id = config.tracking.experiment, _experiment(client, config, uri)
    note = read_json(run_dir / "mlflow.json", {})
    if "run_dir_id" not in note:
        note = {"run_dir_id": uuid.uuid4().hex}
        write_json(run_dir / "mlflow.json", note)
    run = _the_run(
        client,
        experiment_id,
        {"run_dir_id": note["run_dir_id"]},
        int(record.started(run_dir) * 1000),
        run_dir.name,
    )
    here = {"uri": redact(uri), "experiment": name, "run_id": run.info.run_id}
    if any(note.get(key) != value for key, value in here.items()):
        write_json(run_dir / "mlflow.json", {"run_dir_id": note["run_dir_id"], **here, "sent": {}})
    return run


def _the_run(
    client: MlflowClient, experiment_id: str, tags: dict[str, str], started_ms: int, name: str
) -> Run:
    """The one run with these tags, created where there is none.

    A request that creates a run and is answered too late is sent again by the HTTP client: of such doubles the one that was written to
    stays, and the others are deleted, now or at the next pass.
    """
    where = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())

    def all_of_them() -> list[Run]:
        return sorted(
            client.search_runs([experiment_id], where),
            key=lambda run: (-len(run.data.params), run.info.run_id),
        )

    found = all_of_them()
    if not found:
        client.create_run(experiment_id, started_ms, tags, name)
        found = all_of_them()
    for double in found[1:]:
        client.delete_run(double.info.run_id)
    return found[0]


def _send_config(client: MlflowClient, run: Run, config: RunConfig, run_dir: Path) -> None:
    """Parameters, and tags. A parameter cannot change in MLflow: what was changed on resume becomes the tag `changed.<key>`."""
    params = {
        key: as_text(value)
        for key, value in flatten(config).items()
        if not key.startswith(("cluster.", "tracking.", "runs_dir"))
    }
    held, tags = run.data.params, run.data.tags
    log_params(client, run.info.run_id, {key: value for key, value in params.items() if key not in held})
    wanted = {f"changed.{key}": value for key, value in params.items() if held.get(key, value) != value}
    wanted |= {
        key: params[key[8:]] for key in tags if key.startswith("changed.") and key[8:] in params
    }  # also when changed back
    wanted |= {"variant": config.name, "seed": str(config.seed), "run_dir": str(run_dir)}
    if record.commit(run_dir):
        wanted["mlflow.source.git.commit"] = record.commit(run_dir)
    for job in record.jobs(run_dir):
        stage, number = job.get("stage", ""), str(job.get("id", ""))
        wanted[f"stage.{stage}"] = str(job.get("state", ""))
        wanted[f"attempts.{stage}"] = str(len(job.get("attempts", [])))
        ids = wanted.get(f"jobs.{stage}", "").split()
        wanted[f"jobs.{stage}"] = " ".join(ids if number in ids else [*ids, number])
    set_tags(client, run, wanted)


def _send_evaluation(client: MlflowClient, parent: Run, variant: str, evaluation: Evaluation) -> None:
    """One evaluation as a finished child run; one that an earlier pass left half done is completed."""
    from mlflow.entities import Metric

    experiment_id, name = parent.info.experiment_id, f"eval_{evaluation.number}"
    mark = {"mlflow.parentRunId": parent.info.run_id, "eval_number": str(evaluation.number)}
    now, took = int(_written(evaluation) * 1000), int(sum(evaluation.seconds.values()) * 1000)
    child = _the_run(client, experiment_id, mark, now - took, name)
    if child.info.status == "FINISHED":
        return
    run_id = child.info.run_id
    protocol = {clean_name(key): as_text(value) for key, value in evaluation.protocol.items()}
    log_params(
        client, run_id, {key: value for key, value in protocol.items() if key not in child.data.params}
    )
    step = int(evaluation.protocol.get("step", 0))
    values = dict(_child_values(evaluation))
    new = [Metric(key, value, now, step) for key, value in values.items() if key not in child.data.metrics]
    log_metrics(client, run_id, new)
    set_tags(client, child, {"variant": variant, "split": str(evaluation.protocol.get("split", ""))})
    client.log_artifacts(run_id, str(evaluation.folder))
    client.set_terminated(run_id, "FINISHED", now)


def _child_values(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    named: list[tuple[str, Any]] = list(evaluation.metrics.items())
    for name, (low, high) in evaluation.intervals.items():
        named += [(f"{name}_low", low), (f"{name}_high", high)]
    named += [(f"ceiling.{name}", value) for name, value in evaluation.ceilings.items()]
    named += [(f"floor.{name}", value) for name, value in evaluation.floors.items()]
    yield from (
        (clean_name(name), float(value))
        for name, value in named
        if value is not None and math.isfinite(value)
    )


def _send_headline(client: MlflowClient, run: Run, newest: Evaluation) -> None:
    """The headline evaluation's metrics on the parent, at the checkpoint's step, unless that step already shows them."""
    from mlflow.entities import Metric

    split, step = newest.protocol.get("split", "test"), int(newest.protocol.get("step", 0))
    new = []
    for name, value in newest.metrics.items():
        key = clean_name(f"{split}/{name}")
        there = [m for m in _held(client, run, key) if m.step == step]
        shown = max(there, key=lambda m: m.timestamp).value if there else None
        if value is not None and math.isfinite(value) and shown != value:
            new.append(Metric(key, float(value), int(_written(newest) * 1000), step))
    log_metrics(client, run.info.run_id, new)
    protocol = digest(newest.comparable)  # numbers of runs with the same tag may be compared
    set_tags(
        client,
        run,
        {
            "headline.eval": str(newest.number),
            "headline.protocol": protocol,
            "headline.complete": str(newest.complete),
        },
    )


def _held(client: MlflowClient, run: Run, name: str) -> list[Metric]:
    """What the store holds of one metric; no request for one that it has never seen."""
    return client.get_metric_history(run.info.run_id, name) if name in run.data.metrics else []


def _send_status(client: MlflowClient, run: Run, status: str, run_dir: Path) -> None:
    """Say it explicitly: a killed process would leave RUNNING for ever, a resumed run must be open again."""
    if run.info.status == status:
        return
    if status == "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")
    else:
        client.set_terminated(run.info.run_id, status, int(record.ended(run_dir) * 1000))


def _written(evaluation: Evaluation) -> float:
    return (evaluation.folder / "metrics.json").stat().st_mtime

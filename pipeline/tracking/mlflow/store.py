"""An MLflow store: open it, hold its lock, find runs, and write within MLflow's limits."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.paths import SQLITE, database_file
from pipeline.errors import ConfigError
from pipeline.rundir.files import give_usual_mode
from pipeline.rundir.lock import locked
from pipeline.rundir.redact import redact
from pipeline.tracking.base import TrackingError
from pipeline.tracking.mlflow.health import first_line, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's own limits
LOCK_TIMEOUT_S = 120.0
QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default waits for a dead server for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # seconds; a slow server is not a dead one
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def open_client(uri: str) -> MlflowClient:
    """Return an impatient and silent client; it has nothing to do with MLflow's global active run."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # an error is raised too, and told in one line
    file = database_file(uri)
    is_new = file is not None and not file.exists()
    with _without_stray_folders(uri):
        client = MlflowClient(tracking_uri=uri)
        if file is not None and is_new:
            client.search_experiments(max_results=1)  # makes the file
            give_usual_mode(file)  # SQLite makes files that the group may not write
    return client


@contextmanager
def _without_stray_folders(uri: str) -> Iterator[None]:
    """Remove the empty folders that MLflow makes for the path of a SQLite address as it is written.

    SQLAlchemy decodes the path first, so the database lies elsewhere.
    """
    written = Path(uri.removeprefix(SQLITE).split("?")[0])
    stray = []
    if database_file(uri) not in (None, written):
        stray = [folder for folder in written.parents if not folder.exists()]
    yield
    for folder in stray:
        if folder.is_dir():
            folder.rmdir()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold the lock `file`. Raises TrackingError if another process keeps it for LOCK_TIMEOUT_S."""
    give_up = time.monotonic() + LOCK_TIMEOUT_S

    def keep_waiting() -> bool:
        if time.monotonic() > give_up:
            raise TrackingError(
                f"{file}: another process has held this lock for {LOCK_TIMEOUT_S:.0f} s; try again later"
            )
        return True

    with locked(file, keep_waiting=keep_waiting):
        yield


@contextmanager
def database_lock(uri: str) -> Iterator[None]:
    """Let one process at a time use a SQLite file; several that open a new one at once destroy it."""
    file = database_file(uri)
    if file is None:
        yield
        return
    with held(file.with_name(f"{file.name}.lock")):
        yield


def tagged_run_dirs(uri: str, experiment: str, tags: list[str]) -> list[Path]:
    """Return the directories of the runs in a store that carry all `tags` ("key=value"), by name.

    Raises ConfigError or TrackingError.
    """
    where = " and ".join(_condition(tag) for tag in tags)
    file = database_file(uri)
    if file is not None and not file.is_file():
        raise ConfigError(
            f"--uri {redact(uri)}: no such file; name the store of the runs, e.g. sqlite:///runs/mlflow.db"
        )
    try:
        client = open_client(uri)
        found = client.get_experiment_by_name(experiment)
        runs = client.search_runs([found.experiment_id], where) if found else []
    except store_errors() as error:
        raise TrackingError(f"MLflow store {redact(uri)} cannot be read: {first_line(error)}") from None
    run_dirs = sorted({run.data.tags["run_dir"] for run in runs if "run_dir" in run.data.tags})
    if not run_dirs:
        asked = " ".join(f"--tag {tag}" for tag in tags)
        raise ConfigError(f"{asked}: no run in experiment {experiment!r} of {redact(uri)} carries it")
    return [Path(run_dir) for run_dir in run_dirs]


def _condition(tag: str) -> str:
    key, equals, value = tag.partition("=")
    if not equals or "'" in tag or "`" in tag:
        raise ConfigError(f"--tag {tag}: expected KEY=VALUE without quotes, e.g. variant=sigma_cvae_nf")
    return f"tags.`{key}` = '{value}'"


def clean_name(text: str) -> str:
    """Return `text` with the characters replaced that MLflow refuses in names."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", text)


def as_text(value: Any) -> str:
    """Return a parameter or tag as MLflow keeps it: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def log_metrics(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    """Log `metrics` in batches that MLflow accepts."""
    for chunk in _chunks(metrics, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=chunk)


def log_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    """Log `params` in batches that MLflow accepts."""
    from mlflow.entities import Param

    entities = [Param(key, value) for key, value in params.items()]
    for chunk in _chunks(entities, PARAMS_PER_BATCH):
        client.log_batch(run_id, params=chunk)


def set_tags(client: MlflowClient, run: Run, wanted: dict[str, str]) -> None:
    """Set those of the `wanted` tags that `run` does not hold already."""
    from mlflow.entities import RunTag

    tags = [RunTag(key, value) for key, value in wanted.items() if run.data.tags.get(key) != value]
    for chunk in _chunks(tags, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, tags=chunk)


def held_metric(client: MlflowClient, run: Run, name: str) -> list[Metric]:
    """Return what the store holds of one metric; asks nothing about one that it has never seen."""
    return client.get_metric_history(run.info.run_id, name) if name in run.data.metrics else []


def the_run(
    client: MlflowClient, experiment_id: str, tags: dict[str, str], started_ms: int, name: str
) -> Run:
    """Return the one run with these tags; it is created if there is none.

    The HTTP client repeats a request whose answer is late, so a run may be created twice. The one that was
    written to stays, and the others are deleted, now or at the next pass.
    """
    where = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())

    def all_of_them() -> list[Run]:
        found = client.search_runs([experiment_id], where)
        return sorted(found, key=lambda run: (-len(run.data.params), run.info.run_id))

    found = all_of_them()
    if not found:
        client.create_run(experiment_id, started_ms, tags, name)
        found = all_of_them()
    for double in found[1:]:
        client.delete_run(double.info.run_id)
    return found[0]

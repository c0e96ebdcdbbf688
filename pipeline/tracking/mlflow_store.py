"""The MLflow store itself: which one, how to open it quietly, who may write, and writes within MLflow's limits."""

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

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.rundir.lock import locked
from pipeline.rundir.redact import redact

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's own limits
LOCK_TIMEOUT_S = 120.0
QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default waits for a dead server for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # a slow server is not a dead one; only the feeding thread waits
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class TrackingError(UserError):
    """The MLflow store could not be reached or refused to be written."""


def tracking_uri(config: RunConfig) -> str:
    """The store of this run: `tracking.uri`, or one SQLite file for all runs of `runs_dir`."""
    return config.tracking.uri or f"sqlite:///{runs_dir(config) / 'mlflow.db'}"


def runs_dir(config: RunConfig) -> Path:
    """The absolute folder of all runs."""
    return Path(config.runs_dir).expanduser().absolute()


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow raises where a store is unreachable, locked or refuses."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, OSError


def open_client(uri: str) -> MlflowClient:
    """A client of its own (no global active run), impatient and silent."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what fails is raised too, and told in one line
    return MlflowClient(tracking_uri=uri)


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold the lock `file`; raises TrackingError if another process keeps it for LOCK_TIMEOUT_S."""
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
    """One process at a time on a SQLite file: several that open a fresh one at once destroy it. A server sees to itself."""
    if not uri.startswith("sqlite:"):
        yield
        return
    database = Path(uri.split("///", 1)[-1].split("?")[0])
    with held(database.with_name(database.name + ".lock")):
        yield


def tagged_run_dirs(uri: str, experiment: str, tags: list[str]) -> list[Path]:
    """Directories of the runs in a store that carry all `tags` ("key=value"), by name; raises ConfigError or TrackingError."""
    pairs = [tag.partition("=") for tag in tags]
    if wrong := [
        tag for tag, (_, equals, _) in zip(tags, pairs, strict=True) if not equals or "'" in tag or "`" in tag
    ]:
        raise ConfigError(
            f"--tag {wrong[0]}: expected KEY=VALUE without quotes, for example variant=sigma_cvae_nf"
        )
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not file.is_file():
        raise ConfigError(
            f"--uri {redact(uri)}: no such file; name the store of the runs, for example sqlite:///runs/mlflow.db"
        )
    try:
        client = open_client(uri)
        found = client.get_experiment_by_name(experiment)
        where = " and ".join(f"tags.`{key}` = '{value}'" for key, _, value in pairs)
        runs = client.search_runs([found.experiment_id], where) if found else []
    except store_errors() as error:
        raise TrackingError(
            f"MLflow store {redact(uri)} cannot be read: {redact(str(error))[:300]}"
        ) from None
    run_dirs = sorted({run.data.tags["run_dir"] for run in runs if "run_dir" in run.data.tags})
    if not run_dirs:
        raise ConfigError(
            f"--tag {' --tag '.join(tags)}: no run in experiment {experiment!r} of {redact(uri)} carries it"
        )
    return [Path(run_dir) for run_dir in run_dirs]


def clean_name(text: str) -> str:
    """`text` with what MLflow refuses in names replaced."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", text)


def as_text(value: Any) -> str:
    """A parameter or tag as MLflow keeps it: strings as they are, the rest as JSON."""
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

    for chunk in _chunks([Param(key, value) for key, value in params.items()], PARAMS_PER_BATCH):
        client.log_batch(run_id, params=chunk)


def set_tags(client: MlflowClient, run: Run, wanted: dict[str, str]) -> None:
    """Set those of the `wanted` tags that `run` does not hold already."""
    from mlflow.entities import RunTag

    tags = [RunTag(key, value) for key, value in wanted.items() if run.data.tags.get(key) != value]
    for chunk in _chunks(tags, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, tags=chunk)

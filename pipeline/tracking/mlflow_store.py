"""The MLflow store: which one, how to open it, who may write, and writes within MLflow's limits."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config.paths import SQLITE, absolute_path, database_file, sqlite_uri, with_database
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir.files import give_usual_mode
from pipeline.rundir.lock import locked
from pipeline.rundir.redact import redact
from pipeline.tracking.base import TrackingError

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's own limits
LOCK_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
_SQLITE = re.compile(r"sqlite(\+pysqlite)?:(///)?", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|databricks\b", re.IGNORECASE)
QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default waits for a dead server for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # seconds; a slow server is not a dead one
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def with_store(config: RunConfig) -> RunConfig:
    """Return the configuration with the store written out, so that every job and tool finds the same one.

    Empty keys are filled from MLflow's own variables, and a relative SQLite path becomes absolute.
    Raises ConfigError for an address that no store can have.
    """
    tracking = config.tracking
    uri = (tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip()
    if uri and tracking.enabled:
        _require_store(uri, "key 'tracking.uri'" if tracking.uri else "variable MLFLOW_TRACKING_URI")
    uri = _SQLITE.sub(lambda found: SQLITE if found[2] else found[0], uri, count=1)
    file = database_file(uri)
    if file is not None:
        uri = with_database(uri, Path(absolute_path("tracking.uri", str(file))))
    experiment = tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    return replace(config, tracking=replace(tracking, uri=uri, experiment=experiment))


def _require_store(uri: str, where: str) -> None:
    """Raise ConfigError for a folder, a file without `sqlite:///`, or a database in memory."""
    expected = "expected sqlite:///FILE, or the address of a server or database, http://HOST:PORT"
    sqlite = _SQLITE.match(uri)
    is_address = sqlite[2] if sqlite else _SCHEME.match(uri)
    if uri.lower().startswith("file:") or not is_address:
        raise ConfigError(f"{where}: got {redact(uri)!r}, a folder or file; {expected}")
    if sqlite and uri[sqlite.end() :].split("?")[0] in ("", ":memory:"):
        raise ConfigError(f"{where}: got {uri!r}, which keeps nothing; {expected}")


def store_uri(config: RunConfig) -> str:
    """Return the store of a run: `tracking.uri`, or one SQLite file for all runs of `runs_dir`."""
    return config.tracking.uri or sqlite_uri(runs_dir(config) / "mlflow.db")


def experiment_name(config: RunConfig) -> str:
    """Return the experiment that a run belongs to."""
    return config.tracking.experiment or "cvae"


def runs_dir(config: RunConfig) -> Path:
    """Return the absolute folder of all runs."""
    return Path(config.runs_dir).expanduser().absolute()


def is_server(uri: str) -> bool:
    """Return whether the store is a server."""
    return uri.lower().startswith(("http://", "https://"))


def store_errors() -> tuple[type[Exception], ...]:
    """Return what MLflow raises if a store is unreachable, locked, refuses, or lacks its library."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, OSError, ImportError


def first_line(error: Exception) -> str:
    """Return the first line of an error, short and without credentials."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redact(lines[0])[:300]


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


def require_listening(uri: str) -> None:
    """Raise TrackingError if nobody listens at `uri`.

    A connection costs nothing, but importing mlflow takes seconds of the GIL. A proxy is not asked.
    """
    url = urlsplit(uri)
    host = url.hostname or ""
    if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    usual_port = 443 if url.scheme == "https" else 80
    try:
        socket.create_connection((host, url.port or usual_port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise TrackingError(f"MLflow server {redact(uri)} does not answer ({error})") from None


def server_problem(uri: str) -> str:
    """Ask a server as MLflow's client does; return what is wrong, in words, or "".

    The client knows the institute's CA, certificates, logins from variables or ~/.mlflow/credentials, and
    plug-ins. A server may tell everybody that it is well and still want a login for the rest.
    """
    where = f"key 'tracking.uri': {redact(uri)}"
    try:
        require_listening(uri)
        answer = _answer(uri)
    except TrackingError as error:
        why = first_line(error)
        return f"{where} does not answer ({why}); start the server, or set tracking.enabled=false"
    if answer in (401, 403):
        return (
            f"{where} answers {answer}; set the login that it wants (MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN), or start the server with --allowed-hosts "
            "for this name"
        )
    if answer >= 500:
        return f"{where} answers {answer}; is the server well?"
    return ""  # other codes only say that this server has no /health


def database_problem(uri: str) -> str:
    """Return which library the driver of a database lacks here, in words, or ""."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        return (
            f"key 'tracking.uri': {redact(uri)}: its driver is not installed ({error}); install it here and "
            "on the nodes, or name a server, http://HOST:PORT"
        )
    except SQLAlchemyError:
        pass  # no database: `databricks`, or the address of a plug-in of MLflow
    return ""


def _answer(uri: str) -> int:
    """Return the status code of /health, or that of a refused login behind it. Raises TrackingError."""
    refusals: tuple[type[Exception], ...] = (*store_errors(), ValueError)
    try:
        health = _status_code(uri, "GET", "/health")
        if health >= 400:
            return health
        inside = _status_code(uri, "POST", "/api/2.0/mlflow/experiments/search", json={"max_results": 1})
    except refusals as error:
        raise TrackingError(first_line(error)) from None
    return inside if inside in (401, 403) else health  # a proxy may not pass everything on


def _status_code(uri: str, method: str, endpoint: str, **content: Any) -> int:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    login = get_default_host_creds(uri)
    answer = http_request(
        login, endpoint, method, max_retries=0, timeout=CONNECT_TIMEOUT_S, raise_on_status=False, **content
    )
    return int(answer.status_code)


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

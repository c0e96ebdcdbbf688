"""Where the MLflow store of a run is: a SQLite file, a database or a server. Imports no mlflow."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from pipeline.config.paths import SQLITE, absolute_path, database_file, sqlite_uri, with_database
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir.redact import redact

_SQLITE = re.compile(r"sqlite(\+pysqlite)?:(///)?", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|databricks\b", re.IGNORECASE)


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

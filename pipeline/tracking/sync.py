"""Tracking: metrics.jsonl is the truth, MLflow is fed from it and can neither slow nor stop a training."""

from __future__ import annotations

import logging
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config.schema import RunConfig
from pipeline.rundir.metrics_log import MetricsLog, read_metrics
from pipeline.rundir.record import run_config
from pipeline.rundir.redact import redact
from pipeline.tracking.mlflow_store import TrackingError, tracking_uri
from pipeline.tracking.mlflow_sync import Feeder, send_files

__all__ = [
    "Feeder",
    "LiveSync",
    "MetricsLog",
    "TrackingError",
    "read_metrics",
    "redact",
    "sync_run",
    "sync_sweep",
    "tracking_uri",
]

LOG = logging.getLogger("cvae.tracking")
LONGEST_WAIT = 16  # intervals between two tries during an outage


def sync_run(run_dir: Path, log: logging.Logger = LOG) -> None:
    """Make the MLflow store hold everything that `run_dir` holds (one process, any number of times).

    A store that is absent, locked or refuses is one warning, which names the command that sends it later; nothing is raised.
    """
    try:
        Feeder(run_dir.absolute()).push()
    except Exception as error:
        log.warning("%s", redact(str(error)))


def sync_sweep(config: RunConfig, name: str, files: list[Path], log: logging.Logger = LOG) -> None:
    """Keep a sweep's tables as artifacts of the MLflow run `sweep <name>`; a store that refuses is a warning, the files stay."""
    if not config.tracking.enabled:
        return
    try:
        send_files(config, f"sweep {name}", files)
    except Exception as error:
        log.warning("%s", redact(str(error)))


def require_listening(uri: str) -> None:
    """Raise TrackingError where nobody listens at `uri`: a connection costs nothing, importing mlflow holds the GIL for seconds.

    Nothing is tried where a proxy stands in between.
    """
    url = urlsplit(uri)
    host = url.hostname or ""
    if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        socket.create_connection(
            (host, url.port or (443 if url.scheme == "https" else 80)), timeout=10
        ).close()
    except (OSError, ValueError) as error:
        raise TrackingError(f"MLflow server {redact(uri)} does not answer ({error})") from None


class LiveSync:
    """A thread of rank 0 of the train stage that feeds an MLflow server while training runs.

    Does nothing for other stores: jobs on several nodes never open one SQLite file.
    """

    def __init__(self, run_dir: Path, interval_s: float = 20.0, log: logging.Logger = LOG) -> None:
        """Start feeding `run_dir` every `interval_s` seconds."""
        self._feeder, self._interval_s, self._log = Feeder(run_dir.absolute()), interval_s, log
        self._stop, self._failing = threading.Event(), False
        config = run_config(run_dir)
        self._uri = tracking_uri(config)
        self._thread: threading.Thread | None = None
        if config.tracking.enabled and self._uri.startswith(("http://", "https://")):
            self._thread = threading.Thread(target=self._feed, name="mlflow", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Send what is left and end the thread; after `timeout_s` the rest is left to the next `sync_run`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._log.warning(
                    "MLflow is slow to answer; `python tools/sync_mlflow.py %s` sends the rest",
                    self._feeder.run_dir,
                )

    def _feed(self) -> None:
        last, wait_s = False, self._interval_s
        while not last:
            last = self._stop.wait(wait_s)
            try:
                require_listening(self._uri)
                self._feeder.push()
                self._failing, wait_s = False, self._interval_s
            except Exception as error:
                if not self._failing:  # one warning per outage
                    self._log.warning(
                        "%s; `python tools/sync_mlflow.py %s` sends it later",
                        redact(str(error)),
                        self._feeder.run_dir,
                    )
                self._failing, wait_s = True, min(2 * wait_s, LONGEST_WAIT * self._interval_s)

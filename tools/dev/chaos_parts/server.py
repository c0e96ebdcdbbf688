"""A real `mlflow server` that a trial stops, and the proof that nothing is missing afterwards."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from pipeline.runtime.ports import free_port
from tools.dev.chaos_parts.ranks import fork

if TYPE_CHECKING:
    from tools.dev.chaos_parts.trial import Trial

START_S = 120.0


class Server:
    """Listens on one port over a SQLite store; may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen | None = None
        self.start()

    @property
    def uri(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers."""
        if self.process is not None:
            return
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        with open(self.folder / "log", "a") as log:
            environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        give_up = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(
                    f"mlflow server did not start: {(self.folder / 'log').read_text()[-1000:]}"
                )
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """SIGKILL to it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def require_complete(self, trial: Trial) -> None:
        """Start it again, sync twice in a child, and raise RuntimeError where a point is missing, doubled or different."""
        self.start()
        log = trial.folder / "sync.log"
        pid = fork(partial(_sync_and_check, trial.run_dir, self.uri), log)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError(f"after the outage: {log.read_text()[-1500:]}")


def _sync_and_check(run_dir: Path, uri: str) -> int:
    """In a process of its own: the harness itself never imports mlflow."""
    from pipeline.rundir.record import read_json
    from pipeline.tracking.mlflow_store import open_client
    from pipeline.tracking.mlflow_sync import Feeder

    for _ in range(2):
        Feeder(run_dir).push()
    client, run_id = open_client(uri), read_json(run_dir / "mlflow.json")["run_id"]
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    for name in {name for record in records for name in record["values"]}:
        wanted = sorted(
            (r["step"], r["values"][name]) for r in records if math.isfinite(r["values"].get(name, math.nan))
        )
        held = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
        if held != wanted:
            print(f"{name}: the store holds {held}, metrics.jsonl {wanted}")
            return 1
    return 0

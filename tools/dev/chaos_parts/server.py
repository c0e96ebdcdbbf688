"""A real `mlflow server` that trials stop and start, and the check that no metric is missing.

The campaign owns the server through a keeper process. Trials ask the keeper over a pipe. The keeper
ends when the campaign closes it, dies or is killed, and takes the server and its workers with it.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from pipeline.runtime.ports import free_port
from tools.dev.chaos_parts.processes import adopt_orphans, die_with_parent, end_descendants
from tools.dev.chaos_parts.ranks import fork

if TYPE_CHECKING:
    from tools.dev.chaos_parts.trial import Trial

START_S = 120.0


def mlflow_command(folder: Path, port: int) -> list[str]:
    """Return the command of a server with a SQLite store below `folder`."""
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1",
        "--port", str(port),
        "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip


class Server:
    """One server on one port.

    A trial holds `turn` while it uses the server, because it stops it for everybody.
    """

    def __init__(self, folder: Path, command: Callable[[Path, int], list[str]] = mlflow_command) -> None:
        """Fork the keeper; the server itself starts with the first `start`.

        Call it from the main thread.
        """
        folder.mkdir(parents=True)
        self.folder = folder
        self.port = free_port()
        self.turn = get_context("fork").Lock()
        self._requests, keepers_end = Pipe()
        self._keeper = os.fork()
        if self._keeper == 0:
            self._requests.close()
            _keep(command(folder, self.port), self.port, folder / "log", keepers_end)
        keepers_end.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """The address for clients."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server unless it runs, and wait until it answers.

        Raises RuntimeError with the end of its log.
        """
        self._ask("start")

    def stop(self) -> None:
        """Send SIGKILL to the server and to all its workers."""
        self._ask("stop")

    def close(self) -> None:
        """End the keeper and with it the server. Only the campaign calls it."""
        os.kill(self._keeper, signal.SIGTERM)
        os.waitpid(self._keeper, 0)
        self._requests.close()

    def _ask(self, request: str) -> None:
        self._requests.send(request)
        if failure := self._requests.recv():
            raise RuntimeError(failure)

    def require_complete(self, trial: Trial) -> None:
        """Start the server again and sync twice in a child process.

        Raises RuntimeError if a point of a metric is then missing, doubled or different.
        """
        self.start()
        log = trial.folder / "sync.log"
        pid = fork(partial(_sync_and_check, trial.run_dir, self.uri), log)
        status = os.waitpid(pid, 0)[1]
        if os.waitstatus_to_exitcode(status):
            raise RuntimeError(f"after the outage: {log.read_text()[-1500:]}")


def _keep(command: list[str], port: int, log: Path, requests: Connection) -> None:
    """Serve `start` and `stop` until SIGTERM, the end of the campaign or the end of the pipe.

    Never returns.
    """
    try:
        signal.signal(signal.SIGTERM, _end_keeper)
        die_with_parent(signal.SIGTERM)
        adopt_orphans()
        server = None
        while True:
            request = requests.recv()
            failure = ""
            if request == "stop":
                end_descendants()
                server = None
            elif server is None:
                server = _start(command, log)
                failure = _wait_until_it_answers(server, port, log)
                if failure:
                    end_descendants()
                    server = None
            requests.send(failure)
    except (EOFError, OSError):
        pass  # nobody can ask any more
    finally:
        _end_keeper()


def _end_keeper(*_: object) -> None:
    """End the server and the keeper. A signal may call it at any moment, also while it runs."""
    end_descendants()
    os._exit(0)


def _start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # MLflow's own jobs: processes that nobody needs here
    }
    with open(log, "a") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=environment,
            preexec_fn=die_with_parent,
        )


def _wait_until_it_answers(server: subprocess.Popen, port: int, log: Path) -> str:
    """Return an empty string once the server answers, or the reason why it does not."""
    give_up = time.monotonic() + START_S
    while not _answers(port):
        if server.poll() is not None or time.monotonic() > give_up:
            return f"mlflow server did not start: {log.read_text()[-1000:]}"
        time.sleep(0.2)
    return ""


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200
    except OSError:
        return False


def _sync_and_check(run_dir: Path, uri: str) -> int:
    """Return 0 if the store holds what metrics.jsonl holds.

    Runs in its own process: the campaign never imports mlflow.
    """
    from pipeline.rundir.record import read_json
    from pipeline.tracking.mlflow.store import open_client
    from pipeline.tracking.sync import tracker_of

    for _ in range(2):
        tracker_of(run_dir).push()
    client = open_client(uri)
    run_id = read_json(run_dir / "mlflow.json")["run_id"]
    wanted: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(layout.train_dir(run_dir) / "metrics.jsonl"):
        for name, value in record["values"].items():
            points = wanted.setdefault(name, [])
            if math.isfinite(value):
                points.append((record["step"], value))
    for name, points in wanted.items():
        held = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
        if held != sorted(points):
            print(f"{name}: the store holds {held}, metrics.jsonl {sorted(points)}")
            return 1
    return 0

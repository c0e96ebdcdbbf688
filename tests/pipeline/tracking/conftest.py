"""Stores that several tests share; each test has an experiment of its own in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.runtime.ports import free_port
from tests.conftest import ROOT
from tests.fake_run import make_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory whose new store two processes opened at the same time, through the command line."""
    folder = tmp_path_factory.mktemp("runs with 'space")
    made = [make_run(folder, f"first_{i}", ("tracking.experiment=first",), steps=3) for i in range(2)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    command = [sys.executable, "tools/sync_mlflow.py"]
    started = [
        subprocess.Popen([*command, str(run)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        for run in made
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="session")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server` on a copy of the initialised store."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(runs / "mlflow.db", folder / "mlflow.db")
    address = f"127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    log = open(folder / "log", "w")
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        start_new_session=True,
        # Neither telemetry nor the processes that run MLflow's own jobs, which take as long as the server.
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    try:
        give_up = time.monotonic() + 240
        while not healthy(address):
            assert process.poll() is None and time.monotonic() < give_up, (folder / "log").read_text()
            threading.Event().wait(0.1)
        yield f"http://{address}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        log.close()


def healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"http://{address}/health", timeout=1).status == 200
    except OSError:
        return False

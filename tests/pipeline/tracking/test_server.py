"""MLflow over HTTP: a server that works, and one that is dead, mute, slow or refuses."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import exit_code
from pipeline.runtime.ports import free_port
from pipeline.tracking.mlflow import store as mlflow_store
from pipeline.tracking.sync import LiveSync, sync_run, tracker_of
from tests.conftest import ROOT
from tests.fake_run import add_eval, add_metrics, make_run
from tests.pipeline.tracking.in_store import assert_holds_file_once, parent_of, runs_of
from tools import sync_mlflow


def test_live_feed_of_a_real_server(server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_password = server.replace("://", "://ada:secret@")
    run = make_run(tmp_path, overrides=(f"tracking.uri={with_password}", "tracking.experiment=live"), steps=9)
    live = LiveSync(run, interval_s=0.05)
    add_metrics(run, range(11, 20))
    live.stop(timeout_s=120)
    store = mlflow_store.open_client(server)
    parent = parent_of(store, "live")
    assert_holds_file_once(store, parent.info.run_id, run)
    assert parent.info.status == "RUNNING"
    (run / "train/done.json").write_text('{"step": 40, "images": 1024}')
    add_eval(run, 1)
    sync_run(run)
    sync_run(run)
    assert_holds_file_once(store, parent.info.run_id, run)
    assert parent_of(store, "live").info.status == "FINISHED" and len(runs_of(store, "live")) == 2
    config = Path(store.download_artifacts(parent.info.run_id, "config.yaml", str(tmp_path))).read_text()
    assert server.split("//")[1] in config and "secret" not in config + (
        run / "mlflow.json"
    ).read_text() + str(parent.data.tags)
    assert not caplog.records


def test_a_run_without_a_server_ends_up_as_one_with_it(server: str, tmp_path: Path) -> None:
    """One fed live, one sent twice later: every metric, parameter and tag is the same, and there once."""
    found = []
    for name, uri in (("same_live", server), ("same_outage", f"http://127.0.0.1:{free_port()}")):
        run = make_run(
            tmp_path / name, "same", (f"tracking.uri={uri}", f"tracking.experiment={name}"), steps=12
        )
        live = LiveSync(run, interval_s=0.05)
        add_metrics(run, range(13, 25))
        (run / "train/done.json").write_text('{"step": 24, "images": 1024}')
        live.stop(timeout_s=120)
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(uri, server))  # it is back
        for _ in range(2):
            tracker_of(run).push()
        store = mlflow_store.open_client(server)
        parent = parent_of(store, name)
        series = {
            m: sorted((p.step, p.value) for p in store.get_metric_history(parent.info.run_id, m))
            for m in parent.data.metrics
        }
        own = ("run_dir", "run_dir_id", "mlflow.user", "mlflow.source.name", "mlflow.note.content")
        tags = {key: value for key, value in parent.data.tags.items() if key not in own}
        found.append((series, parent.data.params, tags, parent.info.status))
    assert found[0] == found[1] and len(found[0][0]["train/loss"]) == 24


def test_dead_server_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://ada:secret@127.0.0.1:{free_port()}"
    run = make_run(tmp_path, overrides=(f"tracking.uri={uri}",), steps=2)
    sync_run(run)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("cvae")]
    assert f"python tools/sync_mlflow.py {run}" in record.message and "http://***@127.0.0.1" in record.message
    assert "secret" not in caplog.text
    caplog.clear()
    live = LiveSync(run, interval_s=0.01)
    live.stop(timeout_s=60)
    assert [r.name for r in caplog.records if r.name.startswith("cvae")] == ["cvae.tracking"]


def test_a_server_that_never_answers_holds_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and says nothing
        run = make_run(
            tmp_path, overrides=(f"tracking.uri=http://127.0.0.1:{mute.getsockname()[1]}",), steps=2
        )
        live = LiveSync(run, interval_s=0.01)
        live.stop(timeout_s=0.5)
        assert "is slow to answer; `python tools/sync_mlflow.py" in caplog.text


class SlowProxy(ThreadingHTTPServer):
    """Passes every call on to `target`, `delay_s` late."""

    def __init__(self, target: str, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), PassOn)
        self.target, self.delay_s, self.calls = target, delay_s, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class PassOn(BaseHTTPRequestHandler):
    server: SlowProxy

    def do_GET(self) -> None:
        self.server.calls += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        time.sleep(self.server.delay_s)  # the fault itself
        headers = {
            name: value for name, value in self.headers.items() if name in ("Content-Type", "Authorization")
        }
        request = urllib.request.Request(self.server.target + self.path, body, headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with suppress(BrokenPipeError), answer:  # the client may be gone by now
            content = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.end_headers()
            self.wfile.write(content)

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow  # each call takes ten seconds
def test_a_server_that_takes_ten_seconds_for_each_call_holds_nobody_and_is_completed_later(
    server: str, tmp_path: Path
) -> None:
    proxy = SlowProxy(server, 10.0)
    uri = f"http://127.0.0.1:{proxy.server_port}"
    run = make_run(tmp_path, overrides=(f"tracking.uri={uri}", "tracking.experiment=slow"), steps=9)
    script = (
        "import time; from pathlib import Path; from pipeline.tracking.sync import LiveSync;"
        f"live = LiveSync(Path({str(run)!r}), 0.01); time.sleep(25);"
        "start = time.monotonic(); live.stop(5); print(time.monotonic() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and float(done.stdout) < 10 and "is slow to answer" in done.stderr
    assert 0 < proxy.calls < 10  # it was in the middle of its work when the process ended
    proxy.delay_s = 0.0
    for _ in range(2):
        tracker_of(run).push()
    store = mlflow_store.open_client(server)
    assert_holds_file_once(store, parent_of(store, "slow").info.run_id, run)
    proxy.shutdown()
    proxy.server_close()


def test_a_dead_server_is_not_worth_an_import(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=(f"tracking.uri=http://127.0.0.1:{free_port()}",), steps=2)
    script = (
        "import sys; from pathlib import Path; from pipeline.tracking.sync import LiveSync;"
        f"LiveSync(Path({str(run)!r}), 0.01).stop(); print('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "False\n" and "does not answer" in done.stderr, done.stderr


def test_refusing_server_is_asked_a_few_times_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    run = make_run(tmp_path, overrides=(f"tracking.uri=http://127.0.0.1:{httpd.server_port}",), steps=2)
    sync_run(run)
    assert 1 <= len(asked) <= 3 and "403" in caplog.text
    monkeypatch.setattr(sys, "argv", ["sync_mlflow.py", str(run)])
    assert exit_code(sync_mlflow.main) == 2
    httpd.shutdown()
    httpd.server_close()

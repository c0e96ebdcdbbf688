"""tools/fetch_weights.py against a local server: a cut download goes on; nothing else gets the name."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import DataError, StorageError
from pipeline.runtime.ports import free_port
from tests.conftest import ROOT
from tools.fetch_weights import FetchError, fetch

CONTENT = os.urandom(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()[:8]


class Handler(BaseHTTPRequestHandler):
    ranges: list[str | None] = []
    break_after = 0  # bytes of an answer before the connection is cut; 0: never

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        rest = CONTENT[start:]
        self.wfile.write(rest[: self.break_after] if self.break_after else rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Handler, "ranges", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/weights.pth"
        server.shutdown()


def test_a_cut_connection_is_taken_up_where_it_ended(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new folder" / "w.pth"
    monkeypatch.setattr(Handler, "break_after", 100_000)
    for _ in range(2):
        with pytest.raises(FetchError, match="run this again to go on"):
            fetch(url, file, DIGEST)
        assert not file.exists()
    monkeypatch.setattr(Handler, "break_after", 0)
    fetch(url, file, DIGEST)
    assert file.read_bytes() == CONTENT and Handler.ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert [p.name for p in file.parent.iterdir()] == ["w.pth"]
    fetch(url, file, DIGEST)
    assert len(Handler.ranges) == 3  # a complete file is not fetched again


def test_a_finished_part_that_was_never_renamed_is_not_fetched_again(url: str, tmp_path: Path) -> None:
    (tmp_path / ".w.pth.part").write_bytes(CONTENT)
    fetch(url, tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_other_content_never_gets_the_name(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the official file"):
        fetch(url, tmp_path / "w.pth", "00000000")
    assert not list(tmp_path.iterdir())
    (tmp_path / "w.pth").write_bytes(b"what somebody put there")
    with pytest.raises(DataError, match=r"w\.pth: sha256"):
        fetch(url, tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == b"what somebody put there"


def test_a_folder_a_wrong_address_and_a_full_disk_have_their_own_words(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="is a folder, expected the name of a file, such as .*inception"):
        fetch(url, tmp_path, DIGEST)
    for wrong in ("mirror.example/a", "http://127.0.0.1/a b"):
        with pytest.raises(FetchError, match=f"--url: got '{wrong}', expected an address such as https://"):
            fetch(wrong, tmp_path / "w.pth", DIGEST)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"w.pth.part: could not be written .No space left"):
        fetch(url, tmp_path / "w.pth", DIGEST)


def test_no_way_out_says_what_to_do(tmp_path: Path) -> None:
    port = free_port()
    proxied = {"https_proxy": f"http://ada:secret@127.0.0.1:{port}", "no_proxy": "", "NO_PROXY": ""}
    command = [
        sys.executable,
        "tools/fetch_weights.py",
        str(tmp_path / "w.pth"),
        "--url",
        "https://weights.invalid/w.pth",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | proxied, timeout=100
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        f"through the proxy (https 127.0.0.1:{port}" in done.stderr
        and "copy the file to" in done.stderr
        and "secret" not in done.stderr
    )

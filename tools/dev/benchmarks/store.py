"""A store on this machine: an HTTP server with range requests that counts, limits its rate, breaks off."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 1 << 18  # bytes


class Store(ThreadingHTTPServer):
    """Serves the files of one folder. `bytes_per_s` holds for all connections together; 0: no limit."""

    daemon_threads = True

    def __init__(self, folder: Path, bytes_per_s: float = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.bytes_per_s = bytes_per_s
        self.sent: Counter[str] = Counter()  # bytes of each file
        self.cut_after: dict[str, int] = {}  # file: the byte after which every answer breaks off
        self.lock = threading.Lock()
        self.free_at = 0.0  # when the line is free again

    @property
    def url(self) -> str:
        """Return where the files are."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def take_line(self, n: int) -> None:
        """Wait until `n` bytes may be sent."""
        if not self.bytes_per_s:
            return
        with self.lock:
            start = max(time.monotonic(), self.free_at)
            self.free_at = start + n / self.bytes_per_s
        time.sleep(max(0.0, self.free_at - time.monotonic()))


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, with ranges."""

    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer without the content."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """Answer with the content."""
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        """Send the header, and the part that was asked for."""
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        stop = int(asked[2]) + 1 if asked and asked[2] else len(content)
        part = content[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.send(file.name, start, part)

    def send(self, name: str, start: int, part: bytes) -> None:
        """Send a part piece by piece, at the rate of the line."""
        end = self.server.cut_after.get(name, start + len(part))
        for at in range(0, len(part), PIECE):
            piece = part[at : min(at + PIECE, max(0, end - start))]
            self.server.take_line(len(piece))
            with self.server.lock:  # counted first: whoever has the piece may look at once
                self.server.sent[name] += len(piece)
            self.wfile.write(piece)
            if len(piece) < len(part[at : at + PIECE]):
                self.close_connection = True
                return


@contextmanager
def serving(folder: Path, bytes_per_s: float = 0) -> Iterator[Store]:
    """Serve a folder inside the `with` block."""
    store = Store(folder, bytes_per_s)
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()

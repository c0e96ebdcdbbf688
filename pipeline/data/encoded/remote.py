"""Bytes of a tar behind a URL. This file alone opens URLs of training data."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import fsspec

from pipeline.errors import DataError
from pipeline.rundir.layout import MANIFEST

SCHEMES = ("http", "https", "s3")
CHUNK = 1 << 23  # bytes of one request
TRIES = 4
FIRST_WAIT_S = 0.2  # before the second try; doubled for each further one


def is_url(place: str) -> bool:
    """Return whether `place` is a URL rather than a folder."""
    return "://" in place


class Remote:
    """Reads ranges of the files in one remote folder, through fsspec. Threads may share it."""

    def __init__(self, url: str) -> None:
        """Raise DataError if the scheme is unknown, or if its library is not installed."""
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise DataError(f"key 'data.tars': {url}: expected a folder or a URL of {', '.join(SCHEMES)}")
        try:
            self._files = fsspec.filesystem(scheme)
        except ImportError as error:
            raise DataError(f"key 'data.tars': {url}: {error}; install it on every node") from None

    def where(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}"

    def stream(self, entry: dict[str, Any]) -> Iterator[bytes]:
        """Yield the tar of a manifest entry piece by piece.

        Raises DataError that names the URL: at the end if the sha256 differs from the manifest.
        """
        digest = hashlib.sha256()
        for start in range(0, entry["bytes"], CHUNK):
            content = self.read(entry["file"], start, min(start + CHUNK, entry["bytes"]))
            digest.update(content)
            yield content
        if digest.hexdigest() != entry["sha256"]:
            raise DataError(
                f"{self.where(entry['file'])}: its sha256 differs from {MANIFEST}, so its content is "
                "damaged; copy the tar again"
            )

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a file. A connection that breaks is tried again.

        Raises DataError that names the URL if the bytes are not there.
        """
        url = self.where(name)
        wait_s = FIRST_WAIT_S
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(wait_s)
                wait_s *= 2
            try:
                content: bytes = self._files.cat_file(url, start=start, end=stop)
            except FileNotFoundError:
                raise DataError(f"{url}: is not there; copy the tars of this manifest to the store") from None
            except PermissionError as error:
                raise DataError(f"{url}: may not be read ({error}); give the jobs a login for it") from None
            except Exception as error:  # each store has its own errors
                problem = f"{type(error).__name__}: {error}"
                continue
            if len(content) == stop - start:
                return content
            problem = f"{len(content)} bytes came, expected {stop - start}"
        raise DataError(
            f"{url}: bytes {start} to {stop} cannot be read ({problem:.200}) after {TRIES} tries; the file "
            "may be cut short, or the server may not know range requests; copy the tar again"
        )

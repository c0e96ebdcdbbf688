"""A bucket of a local S3 server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch, files: Iterable[Path], prefix: str) -> Iterator[str]:
    """Serve `files` as s3://faces/PREFIX/NAME, with the address and credentials in the environment."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # it would remember another server's address
        client = boto3.client("s3")
        client.create_bucket(Bucket="faces")
        for file in files:
            client.upload_file(str(file), "faces", f"{prefix}/{file.name}")
        yield f"s3://faces/{prefix}"
    finally:
        server.stop()

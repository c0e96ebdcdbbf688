"""Durable small files: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_bytes(file: Path, content: bytes) -> None:
    """Write `content` so that under the final name there is the old content or the new one, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(file: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(file, text.encode())


def write_json(file: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(file, json.dumps(content, indent=1) + "\n")

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
    try:
        with open(temporary, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk gets its bytes back
        raise
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk: without it a renamed file may be gone after a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(file: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(file, text.encode())


def write_json(file: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the key "digest", a sha256 of the rest: a changed bit of a JSON file is found by `intact`."""
    return {**content, "digest": _digest(content)}


def intact(content: dict[str, Any]) -> bool:
    """Whether the digest that `seal` added still fits; so does content that was never sealed."""
    return "digest" not in content or content["digest"] == _digest(
        {k: v for k, v in content.items() if k != "digest"}
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Durable small files: written under a temporary name, brought to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DISK_ERRORS, StorageError

BLOCK = 1 << 20  # bytes that are read at once


def sha256(file: Path) -> str:
    """Return the hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_bytes(file: Path, content: bytes) -> None:
    """Replace `file`, so that a reader finds the old content or the new one, never half of it.

    Raises StorageError if the disk refuses; the old content then stays.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
        sync_folder(file.parent)
    except OSError as error:
        discard(temporary)  # a full disk gets its bytes back
        raise refused(file, error) from error


def discard(file: Path) -> None:
    """Delete `file` if it is there and may be deleted."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        pass  # the folder has become read-only


def refused(file: Path, error: OSError) -> StorageError:
    """Return the StorageError for a failed write of `file`."""
    reason = error.strerror or str(error)
    return StorageError(
        f"{file}: could not be written ({reason}); make room or get the right to write there, "
        "then the same command continues"
    )


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Raise StorageError that names `file` if the disk refuses a write inside the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise refused(file, error) from error


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk; without this a power cut may undo a rename.

    Some network file systems cannot do this for a folder.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(opened)


def write_text(file: Path, text: str) -> None:
    """Replace `file` by UTF-8 text, as `write_bytes` does."""
    write_bytes(file, text.encode())


def write_json(file: Path, content: Any) -> None:
    """Replace `file` by indented JSON, as `write_bytes` does."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def give_usual_mode(file: Path) -> None:
    """Give `file` the mode that the umask (or the folder's default ACL) gives a new file.

    Some libraries create files that only their owner, or not their group, may use.
    """
    probe = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    with open(probe, "xb") as opened:
        mode = os.fstat(opened.fileno()).st_mode
    probe.unlink()
    os.chmod(file, mode & 0o777)


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with the key "digest", a sha256 of the rest, so that `intact` finds a changed bit."""
    return {**content, "digest": _digest(content)}


def intact(content: dict[str, Any]) -> bool:
    """Return whether the digest that `seal` added still fits; true for content that was never sealed."""
    sealed = {key: value for key, value in content.items() if key != "digest"}
    return "digest" not in content or content["digest"] == _digest(sealed)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

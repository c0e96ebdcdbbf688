"""Shards on a node-local disk: copied once per node, verified while they are copied; read in place where that is not possible."""

from __future__ import annotations

import hashlib
import os
import shutil
from logging import Logger
from pathlib import Path
from typing import Any

from pipeline.data.shards import MANIFEST, read_manifest
from pipeline.errors import DataError
from pipeline.rundir.lock import locked

CHUNK = 1 << 22  # bytes
SPARE = 1.05  # of the shards' size that must be free


def staged(folder: Path, target: str, log: Logger, damaged: str = "stop") -> Path:
    """The folder to read the shards of `folder` from: a copy under `target` on this node, or `folder` itself.

    `target` may name environment variables ("$SLURM_TMPDIR"); where one is not set, the place is too small or cannot be written,
    a warning says so. Every rank of the node calls it: the first one copies, the others wait for the lock and find the copy.
    Raises DataError where a shard's content differs from its manifest; with `damaged` "exclude" the original is read instead, and its
    reader leaves that shard out.
    """
    if not target:
        return folder
    place = Path(os.path.expandvars(target))
    if "$" in str(place):
        log.warning(
            "data.stage_to=%s: not set on this node; shards are read in place, from %s", target, folder
        )
        return folder
    local = place / "cvae-shards" / folder.name
    try:
        local.mkdir(parents=True, exist_ok=True)
        with locked(local.with_suffix(".lock")):
            return _copy(folder, local, log)
    except DataError as error:
        if damaged == "stop":
            raise
        log.warning("data.stage_to=%s: %s; shards are read in place, from %s", target, error, folder)
        return folder
    except OSError as error:
        log.warning("data.stage_to=%s: %s; shards are read in place, from %s", target, error, folder)
        return folder


def _copy(folder: Path, local: Path, log: Logger) -> Path:
    manifest = read_manifest(folder)
    text = (folder / MANIFEST).read_bytes()
    if (local / MANIFEST).exists() and (
        local / MANIFEST
    ).read_bytes() == text:  # written last, so the tars are there
        return local
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    needed, free = sum(entry["bytes"] for entry in entries), shutil.disk_usage(local).free
    if free < needed * SPARE:
        log.warning(
            "%s: the shards need %.3g GB, %.3g GB are free; they are read in place, from %s",
            local,
            needed / 1e9,
            free / 1e9,
            folder,
        )
        return folder
    for entry in entries:
        _copy_verified(folder, local, entry)
    (local / MANIFEST).write_bytes(text)
    log.info("%d shards, %.3g GB, copied to %s", len(entries), needed / 1e9, local)
    return local


def _copy_verified(folder: Path, local: Path, entry: dict[str, Any]) -> None:
    digest, temporary = hashlib.sha256(), local / f".{entry['file']}.tmp"
    with open(folder / entry["file"], "rb") as source, open(temporary, "wb") as copy:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != entry["sha256"]:
        temporary.unlink()
        raise DataError(
            f"{folder / entry['file']}: its sha256 differs from {MANIFEST}, so its content is damaged; delete it and {MANIFEST} beside it, "
            "then run the shard stage again (intact shards are kept)"
        )
    temporary.rename(local / entry["file"])

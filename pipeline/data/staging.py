"""Where a rank reads shards from.

They may be copied to a node-local disk once per node, and are verified during the copy. If that is not
possible, they are read in place. Tars behind a URL come through a bounded cache on the node.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from logging import Logger
from pathlib import Path
from typing import Any

from pipeline.config.schema import DataConfig
from pipeline.data.encoded.cache import NodeCache
from pipeline.data.encoded.index import index_file
from pipeline.data.encoded.reader import EncodedShards
from pipeline.data.encoded.remote import Remote, is_url
from pipeline.data.manifest import MEND, entries_of, read_manifest, stored_as
from pipeline.data.shards import Shards
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.rundir.layout import MANIFEST
from pipeline.rundir.lock import locked

CHUNK = 1 << 22  # bytes
SPARE = 1.05  # of the shards' size that must be free


def open_shards(folder: Path, split: str, data: DataConfig) -> Shards:
    """Open one split of the shards in `folder`, whatever their format. Raises ConfigError, DataError."""
    manifest = read_manifest(folder, "ignore")
    if stored_as(manifest) == "strided":
        if data.tars:
            raise ConfigError(
                f"key 'data.tars': the tars of {folder} are strided, so they must lie beside their manifest; "
                "empty the key, or make shards with shard.format=encoded"
            )
        return Shards(folder, split, data.verify, data.damaged)
    if not is_url(data.tars):
        place = Path(data.tars).expanduser() if data.tars else folder
        return EncodedShards(folder, split, data.verify, data.damaged, place)
    cache = node_cache(data, manifest["content_digest"])
    return EncodedShards(folder, split, data.verify, data.damaged, cache)


def node_cache(data: DataConfig, content: str) -> NodeCache:
    """Return this user's cache of the tars with this content digest.

    Raises ConfigError, DataError, and StorageError if the folder cannot be written.
    """
    remote = Remote(data.tars)
    place = os.path.expandvars(data.cache_dir)
    if not place or "$" in place:
        raise ConfigError(
            f"key 'data.cache_dir': {data.cache_dir!r}, expected a folder on the node's own disk: tars of "
            f"{data.tars} are fetched into it"
        )
    folder = Path(place) / f"cvae-cache-{os.getuid()}"  # another user's could not be written
    try:
        return NodeCache(folder / content[:12], int(data.cache_gb * 1e9), remote)
    except StorageError as error:
        raise StorageError(f"key 'data.cache_dir': {error}") from None


def staged(folder: Path, target: str, log: Logger, damaged: str = "stop") -> Path:
    """Return the folder to read the shards of `folder` from: a copy on this node, or `folder` itself.

    `target` is the place for the copy and may name environment variables ("$SLURM_TMPDIR"). If one is
    not set, or the place is too small or cannot be written, a warning says so. Every rank of the node
    calls this: the first one copies, the others wait for the lock and find the copy.
    Raises DataError if a shard differs from its manifest. With `damaged` "exclude" the original is read
    instead, and its reader leaves that shard out.
    """
    if not target:
        return folder
    place = Path(os.path.expanduser(os.path.expandvars(target)))
    if "$" in str(place) or not place.is_absolute():
        log.warning(
            "data.stage_to=%s: not set on this node, or no absolute path; shards are read in place, from %s",
            target,
            folder,
        )
        return folder
    try:
        local = place / "cvae-shards" / read_manifest(folder)["content_digest"][:12]
        local.mkdir(parents=True, exist_ok=True)
        with locked(local.with_suffix(".lock")):
            return _copy(folder, local, log)
    except (DataError, OSError) as error:
        if isinstance(error, DataError) and damaged == "stop":
            raise
        log.warning("data.stage_to=%s: %s; shards are read in place, from %s", target, error, folder)
        return folder


def _copy(folder: Path, local: Path, log: Logger) -> Path:
    manifest = read_manifest(folder)
    text = (folder / MANIFEST).read_bytes()
    copied = local / MANIFEST  # written last, so the tars are there
    if copied.exists() and copied.read_bytes() == text:
        return local
    entries = entries_of(manifest)
    needed = sum(entry["bytes"] for entry in entries)
    free = shutil.disk_usage(local).free
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
        if "index" in entry:
            name = index_file(Path(entry["file"])).name
            shutil.copyfile(folder / name, local / name)
    copied.write_bytes(text)
    log.info("%d shards, %.3g GB, copied to %s", len(entries), needed / 1e9, local)
    return local


def _copy_verified(folder: Path, local: Path, entry: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    temporary = local / f".{entry['file']}.tmp"
    with open(folder / entry["file"], "rb") as source, open(temporary, "wb") as copy:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != entry["sha256"]:
        temporary.unlink()
        raise DataError(
            f"{folder / entry['file']}: its sha256 differs from {MANIFEST}, so its content is damaged; {MEND}"
        )
    temporary.rename(local / entry["file"])

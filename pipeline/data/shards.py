"""Read shards: tars of fixed-length records, memory-mapped as strided arrays and verified against manifest.json."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.records import TAIL, RecordFormat, key_of
from pipeline.errors import DataError
from pipeline.rundir.files import intact, sha256, write_json
from pipeline.rundir.layout import SHARD_FORMAT

MANIFEST = "manifest.json"
MAX_SIZE = 4096  # pixels
log = logging.getLogger("cvae.shards")
_FILE = re.compile(r"(train|val|test)-\d{5}\.tar")


def content_digest(entries: list[dict[str, Any]]) -> str:
    """sha256 over the lines `file sha256` of all shards, in the manifest's order."""
    return hashlib.sha256("".join(f"{e['file']} {e['sha256']}\n" for e in entries).encode()).hexdigest()


def read_manifest(folder: Path, strangers: str = "refuse") -> dict[str, Any]:
    """The manifest of a folder of shards; DataError where it is missing, malformed, or (unless `strangers` is "ignore") lacks a tar."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        form = manifest["format"]
        if form == SHARD_FORMAT:
            entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
            sound = _sound(manifest) and content_digest(entries) == manifest["content_digest"]
    except OSError:
        raise DataError(f"{file}: cannot be read; run the shard stage, which writes it last") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{file}: is damaged; delete it and run the shard stage again") from None
    if form != SHARD_FORMAT:
        raise DataError(
            f"{file}: shards of format {form!r:.80}, expected {SHARD_FORMAT}; delete {folder} and run the shard stage again"
        )
    if not sound:
        raise DataError(
            f"{file}: is damaged (its content_digest does not fit its list of shards); delete it and run the shard stage again"
        )
    if not intact(manifest):
        raise DataError(
            f"{file}: is damaged (its digest does not fit its content); delete it and run the shard stage again"
        )
    for stranger in sorted({tar.name for tar in folder.glob("*.tar")} - {entry["file"] for entry in entries}):
        if strangers == "refuse":
            raise DataError(f"{folder / stranger}: is not listed in {MANIFEST}; remove it")
        log.warning("%s: is not listed in %s and is left alone", folder / stranger, MANIFEST)
    return manifest


def _sound(manifest: dict[str, Any]) -> bool:
    """Whether every entry has the right form, belongs to its split, and is listed once."""
    files: list[str] = []
    for split, content in manifest["splits"].items():
        for e in content["shards"]:
            if not (_FILE.fullmatch(e["file"]) and e["file"].startswith(f"{split}-")):
                return False
            if not all(type(e[key]) is int and e[key] > 0 for key in ("samples", "bytes")):
                return False
            files.append(e["file"])
    names = manifest["attributes"]
    listed = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    return (
        listed
        and len(set(files)) == len(files)
        and type(manifest["size"]) is int
        and 0 < manifest["size"] <= MAX_SIZE
    )


class Shards:
    """One split as an array of samples.

    `verify`: sha256 of every tar "once" (per node and file, remembered in the user's cache folder) or "always".
    `damaged`: what a tar that differs from the manifest does: "stop" (DataError that names the file), or "exclude": it is left out,
    with a warning, and listed in `excluded`; the order of samples is another one then.
    """

    def __init__(self, folder: Path, split: str, verify: str = "once", damaged: str = "stop") -> None:
        self.manifest = read_manifest(folder, "refuse" if damaged == "stop" else "ignore")
        if split not in self.manifest["splits"]:
            raise DataError(
                f"{folder / MANIFEST}: no split {split!r}, expected one of {', '.join(self.manifest['splits'])}"
            )
        self.size: int = self.manifest["size"]
        self.attribute_names: list[str] = self.manifest["attributes"]
        self.content_digest: str = self.manifest["content_digest"]
        self.format = RecordFormat(self.size, len(self.attribute_names))
        listed = self.manifest["splits"][split]["shards"]
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            opened = list(pool.map(lambda entry: _open_or_why(folder, entry, self.format, verify), listed))
        self.excluded: dict[str, int] = {}  # damaged tars that were left out -> their samples
        for entry, result in zip(listed, opened, strict=True):
            if isinstance(result, DataError):
                if damaged == "stop":
                    raise result
                log.warning(
                    "%s; its %d samples are left out (data.damaged=exclude)", result, entry["samples"]
                )
                self.excluded[entry["file"]] = entry["samples"]
        entries = [entry for entry in listed if entry["file"] not in self.excluded]
        self._maps = [result for result in opened if not isinstance(result, DataError)]
        if not entries:
            raise DataError(
                f"{folder}: no intact shard of the {split} split is left; run the shard stage again"
            )
        samples = [entry["samples"] for entry in entries]
        self.bounds = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)  # [n_shards + 1]
        tars = [np.frombuffer(mapped, np.uint8) for mapped in self._maps]
        form = self.format
        self._bytes = [memoryview(mapped) for mapped in self._maps]
        self._attributes = [
            form.column(tar, n, form.attrs_at, form.attrs_bytes) for tar, n in zip(tars, samples, strict=True)
        ]
        self._keys = [form.keys(tar, n) for tar, n in zip(tars, samples, strict=True)]
        self._announced = np.zeros(len(tars), bool)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples at positions `indices` [n], in that order: images uint8 [n, S, S, 3] and attributes uint8 [n, A], both writable.

        One memcpy per sample, from the mapping into its place.
        """
        shard_of, local = self._locate(indices)
        form = self.format
        starts = local * form.length
        images, attributes = [], []
        for shard, start in zip(shard_of.tolist(), starts.tolist(), strict=True):
            tar = self._tar(shard)
            images.append(tar[start + form.image_at : start + form.image_at + form.image_bytes])
            attributes.append(tar[start + form.attrs_at : start + form.attrs_at + form.attrs_bytes])
        return _array(images, form.image_shape), _array(attributes, form.attrs_shape)

    def attributes(self) -> np.ndarray:
        """Attributes of the whole split, uint8 [N, A]."""
        return np.concatenate(self._attributes).view(np.uint8).reshape(-1, *self.format.attrs_shape)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys (image names without .jpg) of the samples at positions `indices`."""
        shard_of, local = self._locate(indices)
        return [
            key_of(bytes(self._keys[shard][row]))
            for shard, row in zip(shard_of.tolist(), local.tolist(), strict=True)
        ]

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each position; IndexError outside [0, N)."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"positions {indices.min()}..{indices.max()}, expected 0..{len(self) - 1}")
        shard_of = np.searchsorted(self.bounds, indices, side="right") - 1
        return shard_of, indices - self.bounds[shard_of]

    def _tar(self, shard: int) -> memoryview:
        """Bytes of a shard; the kernel is asked to read it ahead when it is first touched: random rows from a cold disk are slow."""
        if not self._announced[shard]:
            self._announced[shard] = True
            self._maps[shard].madvise(mmap.MADV_WILLNEED)
        return self._bytes[shard]


def _array(rows: list[memoryview], shape: tuple[int, ...]) -> np.ndarray:
    """Rows of bytes, copied once, as a writable array uint8 [n, *shape]."""
    return np.frombuffer(bytearray().join(rows), np.uint8).reshape(len(rows), *shape)


def _open_or_why(
    folder: Path, entry: dict[str, Any], form: RecordFormat, verify: str
) -> mmap.mmap | DataError:
    try:
        return open_shard(folder, entry, form, verify)
    except DataError as error:
        return error


def open_shard(folder: Path, entry: dict[str, Any], form: RecordFormat, verify: str) -> mmap.mmap:
    """Check one tar against its manifest entry (size, sha256, headers of the first record) and map it read-only.

    Raises DataError that names the file and says how to mend it.
    """
    file = folder / entry["file"]
    mend = f"delete it and {MANIFEST} beside it, then run the shard stage again (intact shards are kept)"
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{file}: is listed in {MANIFEST} but cannot be read ({error.strerror}); {mend}"
        ) from None
    expected = entry["samples"] * form.length + len(TAIL)
    if size != entry["bytes"] or size != expected:
        raise DataError(
            f"{file}: has {size} bytes, expected {entry['bytes']} ({entry['samples']} samples); {mend}"
        )
    if not _verified(file, entry["sha256"], verify):
        raise DataError(f"{file}: its sha256 differs from {MANIFEST}, so its content is damaged; {mend}")
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    key = key_of(mapped[:100].rstrip(b"\0"))
    for at, header in form.headers(key or "?"):
        if mapped[at : at + len(header)] != header:
            raise DataError(
                f"{file}: the first record's headers at byte {at} are not those of its size and type; {mend}"
            )
    return mapped


def _verified(file: Path, expected: str, verify: str) -> bool:
    """Whether the sha256 is as expected; "once" trusts a note of an earlier success on this node and unchanged file."""
    note = _note(file, expected)
    if verify == "once" and note and note.exists():
        return True
    if sha256(file) != expected:
        return False
    try:
        if note:
            write_json(note, {"file": str(file), "sha256": expected})
    except OSError:
        pass  # a cache folder that cannot be written costs time only
    return True


def _note(file: Path, expected: str) -> Path | None:
    """Where a successful verification is noted; None where the user has no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    stat = file.stat()
    identity = [
        socket.gethostname(),
        str(file.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
        stat.st_ino,
        expected,
    ]
    return cache / "cvae-shards" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()

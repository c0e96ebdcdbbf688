"""Read shards: tars of fixed-length records, memory-mapped as strided arrays.

Every tar is verified against the manifest before it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.data.manifest import MEND, crop_of, dataset_info, read_manifest
from pipeline.data.order import Stream
from pipeline.data.records import TAIL, RecordFormat, key_of
from pipeline.errors import DataError
from pipeline.rundir.files import sha256, write_json
from pipeline.rundir.layout import MANIFEST

log = logging.getLogger("cvae.shards")


class Shards:
    """One split as an array of samples.

    `verify` says how often the sha256 of a tar is computed: "once" per node and file (remembered in
    the user's cache folder), or "always". `damaged` says what a tar does that differs from the
    manifest. With "stop" it raises a DataError that names the file. With "exclude" it is left out
    with a warning and listed in `excluded`; the order of samples then changes.
    """

    def __init__(self, folder: Path, split: str, verify: str = "once", damaged: str = "stop") -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, "refuse" if damaged == "stop" else "ignore")
        if split not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise DataError(f"{folder / MANIFEST}: no split {split!r}, expected one of {known}")
        self.size: int = self.manifest["size"]
        self.crop = crop_of(self.manifest)
        self.attribute_names: list[str] = self.manifest["attributes"]
        self.content_digest: str = self.manifest["content_digest"]
        self.info = dataset_info(self.manifest)
        self.excluded: dict[str, int] = {}  # damaged tars that were left out -> their samples
        self.entries: list[dict[str, Any]] = []  # of the intact tars, as in the manifest
        opened: list[Any] = []
        listed = self.manifest["splits"][split]["shards"]
        for entry, result in zip(listed, self._open_all(listed, verify), strict=True):
            if isinstance(result, DataError):
                self._exclude_or_raise(entry, result, damaged)
            else:
                opened.append(result)
                self.entries.append(entry)
        if not opened:
            raise DataError(
                f"{folder}: no intact shard of the {split} split is left; run the shard stage again"
            )
        samples = [entry["samples"] for entry in self.entries]
        self.bounds = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)  # [n_shards + 1]
        self._arrange(opened, samples)

    def _open_one(self, entry: dict[str, Any], verify: str) -> Any:
        """Verify one tar and open it. Raises DataError."""
        form = RecordFormat(self.size, len(self.attribute_names))
        return open_shard(self.folder, entry, form, verify)

    def _arrange(self, opened: list[Any], samples: list[int]) -> None:
        """Take over what `_open_one` returned for each intact tar, and its number of samples."""
        self.format = RecordFormat(self.size, len(self.attribute_names))
        self._maps: list[mmap.mmap] = opened
        self._bytes = [memoryview(mapped) for mapped in self._maps]
        self._attributes: list[np.ndarray] = []
        self._members: list[np.ndarray] = []
        for mapped, n in zip(self._maps, samples, strict=True):
            tar = np.frombuffer(mapped, np.uint8)
            self._attributes.append(self.format.attributes_of(tar, n))
            self._members.append(self.format.members_of(tar, n))
        self._announced = np.zeros(len(samples), bool)

    def _open_all(self, listed: list[dict[str, Any]], verify: str) -> list[Any]:
        """Open the tars in parallel, or say why not: hashing and reading release the interpreter lock."""

        def open_or_why(entry: dict[str, Any]) -> Any:
            try:
                return self._open_one(entry, verify)
            except DataError as error:
                return error

        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            return list(pool.map(open_or_why, listed))

    def _exclude_or_raise(self, entry: dict[str, Any], error: DataError, damaged: str) -> None:
        if damaged == "stop":
            raise error
        log.warning("%s; its %d samples are left out (data.damaged=exclude)", error, entry["samples"])
        self.excluded[entry["file"]] = entry["samples"]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    can_crop: ClassVar[bool] = False  # whether `gather` can cut a box out of each image

    def expect(self, stream: Stream, first: int) -> None:
        """Learn that element `first` of `stream` is read next, and those behind it soon."""

    def close(self) -> None:
        """Release what `expect` took."""

    def gather(self, indices: np.ndarray, boxes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples at positions `indices` [n], in that order.

        Gives images uint8 [n, S, S, 3] and attributes uint8 [n, A], both writable. Each sample is
        copied once, from the mapping into its place. `boxes` are for encoded shards. Raises IndexError.
        """
        assert boxes is None
        shard_of, row_of = self._locate(indices)
        form = self.format
        images: list[memoryview] = []
        attributes: list[memoryview] = []
        for shard, start in zip(shard_of.tolist(), (row_of * form.length).tolist(), strict=True):
            tar = self._tar(shard)
            image_at = start + form.image_at
            attrs_at = start + form.attrs_at
            images.append(tar[image_at : image_at + form.image_bytes])
            attributes.append(tar[attrs_at : attrs_at + form.attrs_bytes])
        return _array(images, form.image_shape), _array(attributes, form.attrs_shape)

    def attributes(self) -> np.ndarray:
        """Return the attributes of the whole split, uint8 [N, A]."""
        return np.concatenate(self._attributes).view(np.uint8).reshape(-1, *self.format.attrs_shape)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return the keys (image names without their ending) of the samples at positions `indices`."""
        shard_of, row_of = self._locate(indices)
        pairs = zip(shard_of.tolist(), row_of.tolist(), strict=True)
        return [key_of(bytes(self._members[shard][row])) for shard, row in pairs]

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row of each position. Raises IndexError outside [0, N)."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"positions {indices.min()}..{indices.max()}, expected 0..{len(self) - 1}")
        shard_of = np.searchsorted(self.bounds, indices, side="right") - 1
        return shard_of, indices - self.bounds[shard_of]

    def _tar(self, shard: int) -> memoryview:
        """Return the bytes of a shard.

        The first touch asks the kernel to read all of it ahead: random rows from a cold disk are slow.
        """
        if not self._announced[shard]:
            self._announced[shard] = True
            self._maps[shard].madvise(mmap.MADV_WILLNEED)
        return self._bytes[shard]


def _array(rows: list[memoryview], shape: tuple[int, ...]) -> np.ndarray:
    """Copy rows of bytes once, into a writable array uint8 [n, *shape]."""
    return np.frombuffer(bytearray().join(rows), np.uint8).reshape(len(rows), *shape)


# ---- verification


def open_shard(folder: Path, entry: dict[str, Any], form: RecordFormat, verify: str) -> mmap.mmap:
    """Check one tar against its manifest entry and map it read-only.

    Compares size, sha256, and the headers of the first record. Raises DataError that names the file
    and says how to mend it.
    """
    file = folder / entry["file"]
    size = _size(file)
    expected = entry["samples"] * form.length + len(TAIL)
    if size != expected:
        raise _wrong_size(file, size, entry)
    mapped = map_verified(file, entry, verify)
    key = key_of(mapped[:100].rstrip(b"\0"))
    for at, header in form.headers(key or "?"):
        if mapped[at : at + len(header)] != header:
            raise DataError(
                f"{file}: the first record's headers at byte {at} are not those of its size and type; {MEND}"
            )
    return mapped


def map_verified(file: Path, entry: dict[str, Any], verify: str) -> mmap.mmap:
    """Compare size and sha256 of a tar with its manifest entry and map it read-only. Raises DataError."""
    size = _size(file)
    if size != entry["bytes"]:
        raise _wrong_size(file, size, entry)
    if not verified(file, entry["sha256"], verify):
        raise DataError(f"{file}: its sha256 differs from {MANIFEST}, so its content is damaged; {MEND}")
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{file}: is listed in {MANIFEST} but cannot be read ({error.strerror}); {MEND}"
        ) from None


def _wrong_size(file: Path, size: int, entry: dict[str, Any]) -> DataError:
    return DataError(
        f"{file}: has {size} bytes, expected {entry['bytes']} ({entry['samples']} samples); {MEND}"
    )


def verified(file: Path, expected: str, verify: str) -> bool:
    """Return whether the sha256 is as expected.

    With `verify` "once", a note of an earlier success on this node is trusted while the file is unchanged.
    """
    note = _note(file, expected)
    if verify == "once" and note and _is_there(note):
        return True
    if sha256(file) != expected:
        return False
    remember(file, expected)
    return True


def remember(file: Path, digest: str) -> None:
    """Note that the file was found to have this sha256."""
    note = _note(file, digest)
    if note:
        try:
            write_json(note, {"file": str(file), "sha256": digest})
        except OSError:
            pass  # without the note the file is only hashed again


def _is_there(note: Path) -> bool:
    """Return whether a note can be found; the folder of another user's cache may be closed."""
    try:
        return note.exists()
    except OSError:
        return False


def _note(file: Path, expected: str) -> Path | None:
    """Return where a successful verification is noted; None if the user has no home."""
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

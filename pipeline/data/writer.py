"""Write shards: which sample goes where, and one tar per task."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.config.schema import ShardConfig
from pipeline.data.encoded.index import Index, index_file, write_index
from pipeline.data.encoded.packer import EncodedTar, image_file
from pipeline.data.journal import ShardReport
from pipeline.data.pixels import cut, green_behind, resize
from pipeline.data.records import TAIL, RecordFormat
from pipeline.data.sources.base import SPLITS, ImageError, ImageReader, InTars, Source
from pipeline.errors import ConfigError, DataError
from pipeline.rundir.files import naming, sha256
from pipeline.runtime.split import ceil_div

CHUNK = 128  # images in memory at a time
PROBED = 32  # images by whose size the place of encoded shards is estimated
Read = TypeVar("Read")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. `done` is the report of an earlier run, trusted if the file has that sha256.

    With `tar` nothing is copied: the shard is an index of images in that tar, and a link to it.
    """

    file: Path
    images: ImageReader
    names: list[str]  # of the images, for their reader
    keys: list[str]  # of the samples
    attributes: np.ndarray  # uint8 [n, A]
    config: ShardConfig
    done: ShardReport | None = None
    tar: Path | None = None


def plan_shards(source: Source, config: ShardConfig, folder: Path) -> list[ShardTask]:
    """Assign the samples to shards.

    A seeded permutation of each split is cut into shards whose sizes differ by at most one. Each
    shard is sorted by key. Shards in place are those of the tars, one for each split that a tar holds.
    Raises ConfigError if the source has no tars that could stay in place.
    """
    if config.format == "in_place":
        return _plan_links(source, config, folder)
    tasks = []
    for index, split in enumerate(SPLITS):
        members = np.flatnonzero(source.splits == index)
        shuffled = members[_permutation(config.seed, index, len(members))]
        count = ceil_div(len(members), config.samples_per_shard)
        for number in range(count):
            first = number * len(members) // count
            last = (number + 1) * len(members) // count
            rows = np.sort(shuffled[first:last])
            tasks.append(_task(source, config, folder / f"{split}-{number:05d}.tar", rows))
    return tasks


def _plan_links(source: Source, config: ShardConfig, folder: Path) -> list[ShardTask]:
    images = source.images
    tars = [images.in_tar(name)[0] for name in source.names] if isinstance(images, InTars) else [None]
    if None in tars:
        raise ConfigError(
            f"key 'shard.format': got 'in_place', but {source.location} holds no tars on this disk to read "
            "in place; use encoded, which packs the images anew"
        )
    tasks = []
    for index, split in enumerate(SPLITS):
        rows_of: dict[Path, list[int]] = {}
        for row in np.flatnonzero(source.splits == index):
            tar = tars[row]
            assert tar is not None
            rows_of.setdefault(tar, []).append(int(row))
        for number, tar in enumerate(sorted(rows_of)):
            file = folder / f"{split}-{number:05d}.tar"
            tasks.append(replace(_task(source, config, file, np.array(rows_of[tar])), tar=tar))
    return tasks


def _task(source: Source, config: ShardConfig, file: Path, rows: np.ndarray) -> ShardTask:
    names = [source.names[row] for row in rows]
    keys = [source.keys[row] for row in rows]
    return ShardTask(file, source.images, names, keys, source.labels[rows], config)


def _permutation(seed: int, split: int, n: int) -> np.ndarray:
    """Return a permutation of n items: sorted raw bits, which are the same in every version of NumPy."""
    generator = np.random.Philox(key=np.array([seed % 2**64, split], np.uint64))
    return np.argsort(generator.random_raw(n), kind="stable")


def check_space(tasks: list[ShardTask], folder: Path) -> None:
    """Raise DataError if the disk of `folder` cannot hold the tars that are still to be written."""
    needed = 0
    for task in tasks:
        if not task.file.exists() and not task.tar:
            needed += len(task.names) * sample_bytes(task) + len(TAIL)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: the shards need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            "make room or set another runs_dir"
        )


def sample_bytes(task: ShardTask) -> int:
    """Return the bytes of one sample in a tar; for encoded ones an estimate from a few images."""
    if task.config.stored_as == "strided":
        return RecordFormat(task.config.size, task.attributes.shape[1]).length
    probe = EncodedTar()
    for row in np.linspace(0, len(task.names) - 1, min(PROBED, len(task.names))).astype(int):
        try:
            content, _ = image_file(task.images, task.names[row])
        except ImageError:
            continue
        probe.pack(task.keys[row], task.attributes[row], content)
    return ceil_div(probe.length, max(1, len(probe.keys)))


def write_shard(task: ShardTask) -> ShardReport:
    """Write one tar, and its index if it is encoded. It gets its name when it is complete.

    Raises DataError at a damaged image unless shard.skip_damaged is set.
    """
    if task.done and _is_done(task.file, task.done):
        return task.done
    temporary = task.file.with_name(f".{task.file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with naming(task.file):
            report = _link(task, temporary) if task.tar else _write(task, temporary)
            os.replace(temporary, task.file)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _is_done(file: Path, report: ShardReport) -> bool:
    if not file.exists() or sha256(file) != report.sha256:
        return False
    index = index_file(file)
    return not report.index or (index.exists() and sha256(index) == report.index)


def _write(task: ShardTask, temporary: Path) -> ShardReport:
    digest = hashlib.sha256()
    kept: list[int] = []
    skipped: list[list[str]] = []
    encoded = EncodedTar() if task.config.stored_as == "encoded" else None
    length = len(TAIL)
    with temporary.open("wb") as file:
        for start in range(0, len(task.names), CHUNK):
            chunk = range(start, min(start + CHUNK, len(task.names)))
            if encoded:
                rows, records = _encode(task, chunk, skipped, encoded)
            else:
                rows, records = _render(task, chunk, skipped)
            file.write(records)
            digest.update(records)
            length += len(records)
            kept += rows
        file.write(TAIL)
        digest.update(TAIL)
        file.flush()
        os.fsync(file.fileno())
    _require_some(task, kept, skipped)
    index = write_index(index_file(task.file), encoded.index()) if encoded else ""
    return _report(task, kept, skipped, length, digest.hexdigest(), index)


def _link(task: ShardTask, temporary: Path) -> ShardReport:
    """Index the readable images of another's tar, and make `temporary` a link to it."""
    assert task.tar is not None and isinstance(task.images, InTars)
    skipped: list[list[str]] = []
    every = range(len(task.names))
    kept = [row for row, _ in _readable(task, every, partial(_cut, task), skipped)]
    _require_some(task, kept, skipped)
    places = [task.images.in_tar(task.names[row]) for row in kept]
    index = Index(
        np.array([start for _, start, _ in places]),
        np.array([length for _, _, length in places]),
        task.attributes[kept],
        [task.keys[row] for row in kept],
    )
    temporary.symlink_to(task.tar)
    length = task.tar.stat().st_size
    written = write_index(index_file(task.file), index)
    return _report(task, kept, skipped, length, sha256(task.tar), written)


def _require_some(task: ShardTask, kept: list[int], skipped: list[list[str]]) -> None:
    if not kept:
        name, reason = skipped[0]
        raise DataError(
            f"all {len(task.names)} images of {task.file.name} are damaged, "
            f"the first is {task.images.where(name)}: {reason}; replace them"
        )


def _report(
    task: ShardTask, kept: list[int], skipped: list[list[str]], length: int, digest: str, index: str
) -> ShardReport:
    return ShardReport(
        file=task.file.name,
        samples=len(kept),
        bytes=length,
        sha256=digest,
        label_counts=task.attributes[kept].sum(axis=0, dtype=np.int64).tolist(),
        skipped=skipped,
        index=index,
    )


def _render(task: ShardTask, rows: range, skipped: list[list[str]]) -> tuple[list[int], bytes]:
    """Return the readable ones of `rows` and their strided records: crop and resize happen here, once."""
    side = task.config.crop or task.config.size
    kept: list[int] = []
    crops = np.empty((len(rows), side, side, 3), np.uint8)
    for row, image in _readable(task, rows, partial(_cut, task), skipped):
        crops[len(kept)] = image
        kept.append(row)
    images = resize(crops[: len(kept)], task.config.size)
    if task.config.background == "green":
        images = green_behind(images)
    form = RecordFormat(task.config.size, task.attributes.shape[1])
    records = form.pack([task.keys[row] for row in kept], task.attributes[kept], images)
    return kept, records.tobytes()


def _encode(
    task: ShardTask, rows: range, skipped: list[list[str]], tar: EncodedTar
) -> tuple[list[int], bytes]:
    """Return the readable ones of `rows` and their records with the image files."""
    kept: list[int] = []
    records: list[bytes] = []
    for row, content in _readable(task, rows, partial(_file, task), skipped):
        records.append(tar.pack(task.keys[row], task.attributes[row], content))
        kept.append(row)
    return kept, b"".join(records)


def _cut(task: ShardTask, row: int) -> np.ndarray:
    """Return the square of an image that is stored, uint8 [C, C, 3]."""
    return cut(task.images.read(task.names[row]), task.config)


def _file(task: ShardTask, row: int) -> bytes:
    """Return an image as a file, if its square can be cut."""
    content, pixels = image_file(task.images, task.names[row])
    cut(pixels, task.config)  # an image that is too small is found now
    return content


def _readable(
    task: ShardTask, rows: range, read: Callable[[int], Read], skipped: list[list[str]]
) -> Iterator[tuple[int, Read]]:
    """Yield each row that can be read, and what `read` makes of it.

    A damaged image is added to `skipped` as [name, reason] if the configuration accepts that. Otherwise
    DataError is raised.
    """
    for row in rows:
        name = task.names[row]
        try:
            found = read(row)
        except ImageError as error:
            if not task.config.skip_damaged:
                raise DataError(
                    f"{task.images.where(name)}: {error}; "
                    "replace it, or set shard.skip_damaged=true to leave out such images"
                ) from None
            skipped.append([name, str(error)])
        else:
            yield row, found

"""Write shards: which sample goes where, and one tar per task."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config.schema import ShardConfig
from pipeline.data.journal import ShardReport
from pipeline.data.pixels import cut, green_behind, resize
from pipeline.data.records import TAIL, RecordFormat
from pipeline.data.sources.base import SPLITS, ImageError, ImageReader, Source
from pipeline.errors import DataError
from pipeline.rundir.files import naming, sha256
from pipeline.runtime.split import ceil_div

CHUNK = 128  # images in memory at a time


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. `done` is the report of an earlier run, trusted if the file has that sha256."""

    file: Path
    images: ImageReader
    names: list[str]  # of the images, for their reader
    keys: list[str]  # of the samples
    attributes: np.ndarray  # uint8 [n, A]
    config: ShardConfig
    done: ShardReport | None = None


def plan_shards(source: Source, config: ShardConfig, folder: Path) -> list[ShardTask]:
    """Assign the samples to shards.

    A seeded permutation of each split is cut into shards whose sizes differ by at most one. Each
    shard is sorted by key.
    """
    tasks = []
    for index, split in enumerate(SPLITS):
        members = np.flatnonzero(source.splits == index)
        shuffled = members[_permutation(config.seed, index, len(members))]
        count = ceil_div(len(members), config.samples_per_shard)
        for number in range(count):
            first = number * len(members) // count
            last = (number + 1) * len(members) // count
            rows = np.sort(shuffled[first:last])
            tasks.append(
                ShardTask(
                    folder / f"{split}-{number:05d}.tar",
                    source.images,
                    [source.names[row] for row in rows],
                    [source.keys[row] for row in rows],
                    source.labels[rows],
                    config,
                )
            )
    return tasks


def _permutation(seed: int, split: int, n: int) -> np.ndarray:
    """Return a permutation of n items: sorted raw bits, which are the same in every version of NumPy."""
    generator = np.random.Philox(key=np.array([seed % 2**64, split], np.uint64))
    return np.argsort(generator.random_raw(n), kind="stable")


def check_space(tasks: list[ShardTask], folder: Path) -> None:
    """Raise DataError if the disk of `folder` cannot hold the tars that are still to be written."""
    needed = 0
    for task in tasks:
        if not task.file.exists():
            record = RecordFormat(task.config.size, task.attributes.shape[1]).length
            needed += len(task.names) * record + len(TAIL)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: the shards need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            "make room or set another runs_dir"
        )


def write_shard(task: ShardTask) -> ShardReport:
    """Decode, crop and resize the images and write one tar. It gets its name when it is complete.

    Raises DataError at a damaged image unless shard.skip_damaged is set.
    """
    if task.done and task.file.exists() and sha256(task.file) == task.done.sha256:
        return task.done
    temporary = task.file.with_name(f".{task.file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with naming(task.file):
            report = _write(task, temporary)
            os.replace(temporary, task.file)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _write(task: ShardTask, temporary: Path) -> ShardReport:
    record = RecordFormat(task.config.size, task.attributes.shape[1])
    digest = hashlib.sha256()
    kept: list[int] = []
    skipped: list[list[str]] = []
    with temporary.open("wb") as file:
        for start in range(0, len(task.names), CHUNK):
            chunk = range(start, min(start + CHUNK, len(task.names)))
            rows, images = _load_images(task, chunk, skipped)
            keys = [task.keys[row] for row in rows]
            records = record.pack(keys, task.attributes[rows], images)
            file.write(records.data)
            digest.update(records.data)
            kept += rows
        file.write(TAIL)
        digest.update(TAIL)
        file.flush()
        os.fsync(file.fileno())
    if not kept:
        name, reason = skipped[0]
        raise DataError(
            f"all {len(task.names)} images of {task.file.name} are damaged, "
            f"the first is {task.images.where(name)}: {reason}; replace them"
        )
    return ShardReport(
        file=task.file.name,
        samples=len(kept),
        bytes=len(kept) * record.length + len(TAIL),
        sha256=digest.hexdigest(),
        label_counts=task.attributes[kept].sum(axis=0, dtype=np.int64).tolist(),
        skipped=skipped,
    )


def _load_images(task: ShardTask, rows: range, skipped: list[list[str]]) -> tuple[list[int], np.ndarray]:
    """Return the readable ones of `rows` and their pixels, uint8 [n, S, S, 3].

    The others are added to `skipped` as [name, reason].
    """
    side = task.config.crop or task.config.size
    kept: list[int] = []
    crops = np.empty((len(rows), side, side, 3), np.uint8)
    for row in rows:
        name = task.names[row]
        try:
            crops[len(kept)] = cut(task.images.read(name), task.config)
        except ImageError as error:
            if not task.config.skip_damaged:
                raise DataError(
                    f"{task.images.where(name)}: {error}; "
                    "replace it, or set shard.skip_damaged=true to leave out such images"
                ) from None
            skipped.append([name, str(error)])
        else:
            kept.append(row)
    images = resize(crops[: len(kept)], task.config.size)
    return kept, green_behind(images) if task.config.background == "green" else images

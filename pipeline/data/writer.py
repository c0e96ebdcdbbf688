"""Write shards: which sample goes where, one tar per task in parallel processes, and the manifest of all."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import ShardConfig
from pipeline.data.journal import ShardReport
from pipeline.data.pixels import crop_centre, decode, resize
from pipeline.data.records import TAIL, RecordFormat
from pipeline.data.shards import content_digest
from pipeline.data.sources.celeba import CELEBA_ATTRIBUTES, SPLITS, Celeba, read_image
from pipeline.errors import DataError
from pipeline.rundir.files import seal, sha256
from pipeline.rundir.layout import SHARD_FORMAT
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.runtime.split import ceil_div

CHUNK = 128  # images in memory at a time
LISTED_SKIPS = 100  # damaged images named in the manifest; the others are only counted


@dataclass(frozen=True)
class ShardTask:
    """One shard to write; `done` is the report of an earlier run, trusted if the file still has that sha256."""

    file: Path
    images: Path
    names: list[str]
    attributes: np.ndarray  # uint8 [n, A]
    config: ShardConfig
    done: ShardReport | None = None


def plan_shards(celeba: Celeba, config: ShardConfig, folder: Path) -> list[ShardTask]:
    """A seeded permutation of each split, cut into shards whose sizes differ by at most one, each sorted by key."""
    tasks = []
    for index, split in enumerate(SPLITS):
        members = np.flatnonzero(celeba.partition == index)
        # Raw bits of a counter-based generator, sorted: the same permutation in every version of numpy.
        bits = np.random.Philox(key=np.array([config.seed % 2**64, index], np.uint64)).random_raw(
            len(members)
        )
        shuffled = members[np.argsort(bits, kind="stable")]
        count = ceil_div(len(members), config.samples_per_shard)
        for number in range(count):
            rows = np.sort(shuffled[number * len(members) // count : (number + 1) * len(members) // count])
            names = [celeba.names[row] for row in rows]
            tasks.append(
                ShardTask(
                    folder / f"{split}-{number:05d}.tar",
                    celeba.images,
                    names,
                    celeba.attributes[rows],
                    config,
                )
            )
    return tasks


def check_space(tasks: list[ShardTask], folder: Path) -> None:
    """Raise DataError where the disk of `folder` cannot hold the tars that are still to be written."""
    record = RecordFormat(tasks[0].config.size, len(CELEBA_ATTRIBUTES)).length
    needed = sum(len(task.names) * record + len(TAIL) for task in tasks if not task.file.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: the shards need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; make room or set another runs_dir"
        )


# ---- one shard


def write_shard(task: ShardTask) -> ShardReport:
    """Decode, crop, resize and write one tar; it appears under its name when it is complete.

    Raises DataError at a damaged image unless shard.skip_damaged is set.
    """
    if task.done and task.file.exists() and sha256(task.file) == task.done.sha256:
        return task.done
    record = RecordFormat(task.config.size, task.attributes.shape[1])
    digest = hashlib.sha256()
    kept: list[int] = []
    skipped: list[list[str]] = []
    temporary = task.file.with_name(f".{task.file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for start in range(0, len(task.names), CHUNK):
                rows, images = _load_images(task, range(start, min(start + CHUNK, len(task.names))), skipped)
                records = record.pack(
                    [task.names[row].removesuffix(".jpg") for row in rows], task.attributes[rows], images
                )
                file.write(records.data)
                digest.update(records.data)
                kept += rows
            file.write(TAIL)
            digest.update(TAIL)
            file.flush()
            os.fsync(file.fileno())
        if not kept:
            raise DataError(
                f"{task.images}: all {len(task.names)} images of {task.file.name} are damaged: {' '.join(skipped[0])}"
            )
        os.replace(temporary, task.file)
    finally:
        temporary.unlink(missing_ok=True)
    counts = task.attributes[kept].sum(axis=0, dtype=np.int64).tolist()
    return ShardReport(
        task.file.name, len(kept), len(kept) * record.length + len(TAIL), digest.hexdigest(), counts, skipped
    )


def _load_images(task: ShardTask, rows: range, skipped: list[list[str]]) -> tuple[list[int], np.ndarray]:
    """The readable ones of `rows` and their pixels, uint8 [n, S, S, 3]; the others are added to `skipped` as [name, reason]."""
    kept: list[int] = []
    crops = np.empty((len(rows), task.config.crop, task.config.crop, 3), np.uint8)
    for row in rows:
        name = task.names[row]
        try:
            crops[len(kept)] = crop_centre(decode(read_image(task.images, name)), task.config.crop)
            kept.append(row)
        except (ValueError, OSError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"cannot be read ({error.strerror})"
            if not task.config.skip_damaged:
                raise DataError(
                    f"{task.images / name}: {reason}; replace it, or set shard.skip_damaged=true to leave out such images"
                ) from None
            skipped.append([name, reason])
    return kept, resize(crops[: len(kept)], task.config.size)


# ---- all shards


def write_shards(tasks: list[ShardTask], processes: int, stop: StopFlag) -> Iterator[ShardReport]:
    """Write the tasks' shards, yielding each report as it is ready; the bytes do not depend on `processes`.

    Raises Stopped after the shards in flight, once a stop is requested; DataError of the first bad image.
    """
    if processes == 1 or len(tasks) == 1:
        for task in tasks:
            _honour(stop)
            yield write_shard(task)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # fork is not safe beside threads (torch, the log, tracking)
    pool = ProcessPoolExecutor(min(processes, len(tasks)), context, _start_worker)
    futures = [pool.submit(write_shard, task) for task in tasks]
    try:
        for future in as_completed(futures):
            if stop.requested:
                for waiting in futures:
                    waiting.cancel()  # no effect on those in flight
            if not future.cancelled():
                yield future.result()
    except BrokenProcessPool:
        _honour(stop)  # a signal to the whole job reached a worker that was still starting
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if any(future.cancelled() for future in futures):
        _honour(stop)


def _honour(stop: StopFlag) -> None:
    if stop.requested:
        raise Stopped("asked to stop between two shards; finished ones are kept")


def _start_worker() -> None:
    """One thread per worker; stop signals are the parent's to handle, but no worker outlives its parent."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---- manifest


def build_manifest(celeba: Celeba, config: ShardConfig, reports: list[ShardReport]) -> dict[str, Any]:
    """What readers need to know; nothing in it depends on where the source lies or on how the shards were written."""
    reports = sorted(reports, key=lambda report: (SPLITS.index(report.file.split("-")[0]), report.file))
    splits: dict[str, Any] = {}
    for split in SPLITS:
        own = [report for report in reports if report.file.startswith(f"{split}-")]
        entries = [{"file": r.file, "samples": r.samples, "bytes": r.bytes, "sha256": r.sha256} for r in own]
        splits[split] = {
            "samples": sum(r.samples for r in own),
            "label_counts": np.sum([r.label_counts for r in own], 0).tolist(),
            "shards": entries,
        }
    skipped = sorted(skip for report in reports for skip in report.skipped)
    manifest = {
        "format": SHARD_FORMAT,
        "content_digest": content_digest([entry for split in splits.values() for entry in split["shards"]]),
        "size": config.size,
        "crop": config.crop,
        "seed": config.seed,
        "attributes": list(CELEBA_ATTRIBUTES),
        "source": celeba.digests,
        "counts": {"annotated": celeba.annotated, "present": len(celeba.names), "skipped": len(skipped)},
        "skipped": skipped[:LISTED_SKIPS],
        "splits": splits,
    }
    return seal(manifest)

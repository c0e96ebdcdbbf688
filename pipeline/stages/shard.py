"""The shard stage: a data set -> WebDataset tars and their manifest.

Shards are made once for every run that wants the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.config.schema import RunConfig, ShardConfig
from pipeline.data.annotations import write_annotations
from pipeline.data.journal import Journal, ShardReport, clear_folder
from pipeline.data.manifest import build_manifest, crop_of, dataset_info, read_manifest
from pipeline.data.sources.base import Source, require_sizes_fit, with_usual_crop
from pipeline.data.sources.registry import changed_labels, open_source
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.data.sources.toy.source import ToyFaces
from pipeline.data.workers import write_shards
from pipeline.data.writer import ShardTask, check_space, plan_shards
from pipeline.errors import ConfigError
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.rundir.layout import MANIFEST
from pipeline.rundir.lock import locked
from pipeline.runtime.context import Context
from pipeline.runtime.logs import progress
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.runtime.split import ceil_div

WORTH_A_PROCESS = 1000  # images: fewer are written before another process has started


def run(config: RunConfig, context: Context) -> None:
    """Fill layout.shards_dir(config). Rank 0 works with all cores of its job; the other ranks wait.

    With `context.part`, only that part's tars are written, beside other jobs that write theirs. The whole
    stage runs afterwards: it finds them, makes what is missing, and writes the manifest.
    Raises ConfigError, DataError (what is wrong with the source), or Stopped; finished shards are kept.
    """
    stopped = torch.zeros(1, device=context.ranks.device)
    if context.ranks.is_main:
        try:
            if context.part:
                make_part(config, context)
            else:
                make_shards(config, context)
        except Stopped:
            stopped += 1
    if context.ranks.reduce_sum(stopped).item():  # all ranks; the others wait here for rank 0's work
        raise Stopped("the shard stage was asked to stop; the next start makes the shards that are missing")


def make_shards(config: RunConfig, context: Context) -> None:
    """Make all shards (rank 0). If another run is making the same ones, wait for it."""
    folder = layout.shards_dir(config)
    if is_complete(config, context):  # no lock: this user may not be able to write beside them
        return
    with held(folder.with_suffix(".lock"), context.stop):
        if is_complete(config, context):
            return
        source, tasks = planned(config, context)
        start = time.monotonic()
        journal = Journal(folder / "journal.jsonl")
        done = journal.resume(_decides(source, config.shard), {task.file.name for task in tasks})
        clear_folder(folder, keep=set(done))
        reports = write_all(tasks, done, journal, context)
        annotations = write_annotations(folder, source.annotated)
        cut = with_usual_crop(config.shard, source.info)
        manifest = build_manifest(source, cut, reports, annotations)
        write_json(folder / MANIFEST, manifest)
    written = sum(report.samples for report in reports)
    rate = written / (time.monotonic() - start)
    damaged = manifest["counts"]["skipped"]
    text = "%d images in %d shards, %.0f images/s; %d damaged"
    context.log.info(text, written, len(reports), rate, damaged)


def make_part(config: RunConfig, context: Context) -> None:
    """Write tars k, k + n, k + 2n, ... for part (k, n), noted in a journal of this part (rank 0)."""
    assert context.part is not None
    k, n = context.part
    folder = layout.shards_dir(config)
    if is_complete(config, context):
        return
    # Parts work side by side, but never beside the whole stage, which deletes what it does not know.
    with (
        held(folder.with_suffix(".lock"), context.stop, shared=True),
        held(folder.with_suffix(f".{k}-of-{n}.lock"), context.stop),
    ):
        if is_complete(config, context):
            return
        source, tasks = planned(config, context)
        mine = tasks[k::n]
        journal = Journal(folder / f"journal-{k}-of-{n}.jsonl")
        done = journal.resume(_decides(source, config.shard), {task.file.name for task in mine})
        reports = write_all(mine, done, journal, context)
    written = sum(report.samples for report in reports)
    context.log.info("part %d of %d: %d images in %d shards", k, n, written, len(reports))


def _decides(source: Source, config: ShardConfig) -> dict[str, str]:
    """Return what finished shards must share to be kept: the source, and the crop that its images get.

    The folder does not tell the crop: the usual one and 148 share it. See `layout.shards_digest`.
    """
    return {**source.fingerprint, "crop": str(with_usual_crop(config, source.info).crop)}


def is_complete(config: RunConfig, context: Context) -> bool:
    """Return whether the shards are there already, and say so. Raises ConfigError if their crop differs."""
    folder = layout.shards_dir(config)
    if not (folder / MANIFEST).exists():
        return False
    if not config.data.shards:
        require_same_crop(folder, config.shard)
    context.log.info("%s is there already", folder)
    warning = changed_labels(config)
    if warning:
        context.log.warning("%s", warning)
    return True


def require_same_crop(folder: Path, config: ShardConfig) -> None:
    """Raise ConfigError if finished shards have another crop. See `layout.shards_digest`."""
    manifest = read_manifest(folder, "ignore")
    wanted = with_usual_crop(config, dataset_info(manifest)).crop
    if crop_of(manifest) != wanted:
        raise ConfigError(
            f"key 'shard.crop': got {config.crop}, but the shards in {folder} were cut with "
            f"{crop_of(manifest)}; delete that folder, or keep its crop"
        )


def planned(config: RunConfig, context: Context) -> tuple[Source, list[ShardTask]]:
    """Open and check the source, and plan its shards. Toy faces are drawn first if there are none yet.

    Raises ConfigError if crop and size do not fit the images, DataError if the source is not sound.
    """
    source: Source
    if config.shard.source:
        source = open_source(layout.source_place(config), config.shard)
    else:
        path = layout.source_path(config)
        # The folder appears by one rename. A complete one may lie where this user cannot make a lock.
        lock = nullcontext() if path.exists() else held(path.with_suffix(".lock"), context.stop)
        with lock:
            make_toy_celeba(path, config.toy.n, config.toy.seed, _cores(), context.log, context.stop)
        source = ToyFaces.open(path)
    require_sizes_fit(config.shard, source.info)
    annotated = len(source.annotated.splits)
    context.log.info("%s: %d images of %d annotated", source.location, len(source.keys), annotated)
    folder = layout.shards_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    return source, plan_shards(source, with_usual_crop(config.shard, source.info), folder)


def write_all(
    tasks: list[ShardTask], done: dict[str, ShardReport], journal: Journal, context: Context
) -> list[ShardReport]:
    """Write the shards of `tasks` that are not `done`, and note each in `journal` when it is finished."""
    tasks = [replace(task, done=done.get(task.file.name)) for task in tasks]
    if not tasks:
        return []
    check_space(tasks, tasks[0].file.parent)
    images = sum(len(task.names) for task in tasks)
    processes = min(_cores(), ceil_div(images, WORTH_A_PROCESS))
    finished = write_shards(tasks, processes, context.stop)
    reports = []
    for report in progress(finished, len(tasks), "shards", context.log):
        if done.get(report.file) != report:
            journal.add(report)
        reports.append(report)
    return reports


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def held(lock: Path, stop: StopFlag, shared: bool = False) -> Iterator[None]:
    """Hold the file `lock` against other processes; holders of a `shared` lock only exclude the others.

    The kernel frees it, even after a kill. Raises Stopped if a stop is requested during the wait.
    """

    def keep_waiting() -> bool:
        if stop.requested:
            raise Stopped(f"asked to stop while another process held {lock}")
        return True

    with locked(lock, shared, keep_waiting):
        yield

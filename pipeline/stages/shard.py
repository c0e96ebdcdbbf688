"""CelebA files (or faces drawn here) -> WebDataset tars and their manifest, once for every run that wants the same."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.config.schema import RunConfig
from pipeline.data.journal import Journal, ShardReport, clear_folder
from pipeline.data.pixels import HEIGHT, WIDTH
from pipeline.data.shards import MANIFEST
from pipeline.data.sources.celeba import Celeba, read_celeba
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.data.writer import ShardTask, build_manifest, check_space, plan_shards, write_shards
from pipeline.errors import ConfigError
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.rundir.lock import locked
from pipeline.runtime.context import Context
from pipeline.runtime.logs import progress
from pipeline.runtime.preempt import StopFlag, Stopped


def run(config: RunConfig, context: Context) -> None:
    """Fill layout.shards_dir(config); rank 0 works with all cores of its job, the other ranks wait for it.

    With `context.part` only that part's tars are written, beside other jobs that write theirs: the whole stage, run
    afterwards, finds them, makes what is missing, and writes the manifest.
    Raises ConfigError, DataError (what is wrong with the source), Stopped (finished shards are kept for the next start).
    """
    if config.shard.crop > min(WIDTH, HEIGHT):
        raise ConfigError(
            f"key 'shard.crop': got {config.shard.crop}, expected at most {WIDTH}: an aligned image is {WIDTH}x{HEIGHT} pixels"
        )
    stopped = torch.zeros(1, device=context.ranks.device)
    if context.ranks.is_main:
        try:
            make_part(config, context) if context.part else make_shards(config, context)
        except Stopped:
            stopped += 1
    if context.ranks.reduce_sum(stopped).item():  # all ranks; also the barrier behind rank 0's work
        raise Stopped(
            "the shard stage was asked to stop; the next start goes on with the shards that are missing"
        )


def make_shards(config: RunConfig, context: Context) -> None:
    """The work of rank 0; waits where another run is making the same shards."""
    folder, log = layout.shards_dir(config), context.log
    processes = len(os.sched_getaffinity(0))
    with held(folder.with_suffix(".lock"), context.stop):
        if (folder / MANIFEST).exists():
            log.info("%s is there already", folder)
            return
        celeba, tasks = planned(config, context, processes)
        start, journal = time.monotonic(), Journal(folder / "journal.jsonl")
        done = journal.resume(celeba.digests, {task.file.name for task in tasks})
        clear_folder(folder, keep=set(done))
        reports = write_all(tasks, done, journal, context, processes)
        manifest = build_manifest(celeba, config.shard, reports)
        write_json(folder / MANIFEST, manifest)
    written, seconds = sum(report.samples for report in reports), time.monotonic() - start
    log.info(
        "%d images in %d shards, %.0f images/s; %d damaged",
        written,
        len(reports),
        written / seconds,
        manifest["counts"]["skipped"],
    )


def make_part(config: RunConfig, context: Context) -> None:
    """Tars k, k + n, k + 2n, ... for part (k, n), noted in a journal of their own."""
    assert context.part is not None
    (k, n), folder = context.part, layout.shards_dir(config)
    processes = len(os.sched_getaffinity(0))
    # Parts work side by side, but not beside the whole stage, which clears away what it does not know.
    with (
        held(folder.with_suffix(".lock"), context.stop, shared=True),
        held(folder.with_suffix(f".{k}-of-{n}.lock"), context.stop),
    ):
        if (folder / MANIFEST).exists():
            context.log.info("%s is there already", folder)
            return
        celeba, tasks = planned(config, context, processes)
        journal = Journal(folder / f"journal-{k}-of-{n}.jsonl")
        done = journal.resume(celeba.digests, {task.file.name for task in tasks[k::n]})
        reports = write_all(tasks[k::n], done, journal, context, processes)
    context.log.info(
        "part %d of %d: %d images in %d shards", k, n, sum(report.samples for report in reports), len(reports)
    )


def planned(config: RunConfig, context: Context, processes: int) -> tuple[Celeba, list[ShardTask]]:
    """The source, checked (drawn first where it is the toy faces), and the shards that it will become."""
    source, folder = layout.source_path(config), layout.shards_dir(config)
    if not config.shard.source:
        with held(source.with_suffix(".lock"), context.stop):
            make_toy_celeba(source, config.toy.n, config.toy.seed, processes, context.log)
    celeba = read_celeba(source, config.shard.allow_subset)
    context.log.info("%s: %d images of %d annotated", celeba.images, len(celeba.names), celeba.annotated)
    folder.mkdir(parents=True, exist_ok=True)
    return celeba, plan_shards(celeba, config.shard, folder)


def write_all(
    tasks: list[ShardTask], done: dict[str, ShardReport], journal: Journal, context: Context, processes: int
) -> list[ShardReport]:
    """Write the shards of `tasks` that are not `done`, each noted in `journal` when it is there."""
    tasks = [replace(task, done=done.get(task.file.name)) for task in tasks]
    if not tasks:
        return []
    check_space(tasks, tasks[0].file.parent)
    reports = []
    for report in progress(write_shards(tasks, processes, context.stop), len(tasks), "shards", context.log):
        if done.get(report.file) != report:
            journal.add(report)
        reports.append(report)
    return reports


@contextmanager
def held(lock: Path, stop: StopFlag, shared: bool = False) -> Iterator[None]:
    """Hold the file `lock` against other processes, or `shared` with some (the kernel frees it, even after a kill).

    Raises Stopped where asked to stop while waiting.
    """

    def keep_waiting() -> bool:
        if stop.requested:
            raise Stopped(f"asked to stop while another process held {lock}")
        return True

    with locked(lock, shared, keep_waiting):
        yield

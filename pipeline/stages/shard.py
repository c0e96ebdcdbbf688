"""CelebA files (or faces drawn here) -> WebDataset tars and their manifest, once for every run that wants the same."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pipeline import layout
from pipeline.data.celeba import read_celeba
from pipeline.data.journal import Journal
from pipeline.data.pixels import HEIGHT, WIDTH
from pipeline.data.shards import MANIFEST
from pipeline.data.toy.dataset import make_toy_celeba
from pipeline.data.writer import build_manifest, check_space, plan_shards, write_shards
from pipeline.errors import ConfigError
from pipeline.runtime.context import Context
from pipeline.runtime.files import write_json
from pipeline.runtime.logs import progress
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.schema import RunConfig


def run(config: RunConfig, context: Context) -> None:
    """Fill layout.shards_dir(config); rank 0 works with all cores of its job, the other ranks wait for it.

    Raises ConfigError, DataError (what is wrong with the source), Stopped (finished shards are kept for the next start).
    """
    if config.shard.crop > min(WIDTH, HEIGHT):
        raise ConfigError(
            f"key 'shard.crop': got {config.shard.crop}, expected at most {WIDTH}: an aligned image is {WIDTH}x{HEIGHT} pixels"
        )
    stopped = torch.zeros(1, device=context.ranks.device)
    if context.ranks.is_main:
        try:
            make_shards(config, context)
        except Stopped as reason:
            context.log.info("%s", reason)
            stopped += 1
    if context.ranks.reduce_sum(stopped).item():  # all ranks; also the barrier behind rank 0's work
        raise Stopped("the shard stage was asked to stop; the next start goes on with the shards that are missing")


def make_shards(config: RunConfig, context: Context) -> None:
    """The work of rank 0; waits where another run is making the same shards."""
    folder, log = layout.shards_dir(config), context.log
    processes = len(os.sched_getaffinity(0))
    with exclusive(folder.with_suffix(".lock"), context.stop):
        if (folder / MANIFEST).exists():
            log.info("%s is there already", folder)
            return
        source = layout.source_path(config)
        if not config.shard.source:
            make_toy_celeba(source, config.toy.n, config.toy.seed, processes, log)
        celeba = read_celeba(source, config.shard.allow_subset)
        log.info("%s: %d images of %d annotated", celeba.images, len(celeba.names), celeba.annotated)
        folder.mkdir(parents=True, exist_ok=True)
        tasks = plan_shards(celeba, config.shard, folder)
        journal = Journal(folder / "journal.jsonl")
        done = journal.resume(celeba.digests, {task.file.name for task in tasks})
        tasks = [replace(task, done=done.get(task.file.name)) for task in tasks]
        check_space(tasks, folder)
        start, reports = time.monotonic(), []
        for report in progress(write_shards(tasks, processes, context.stop), len(tasks), "shards", log):
            if done.get(report.file) != report:
                journal.add(report)
            reports.append(report)
        manifest = build_manifest(celeba, config.shard, reports)
        write_json(folder / MANIFEST, manifest)
    written, seconds = sum(report.samples for report in reports), time.monotonic() - start
    log.info("%d images in %d shards, %.0f images/s; %d damaged", written, len(reports), written / seconds, manifest["counts"]["skipped"])


@contextmanager
def exclusive(lock: Path, stop: StopFlag) -> Iterator[None]:
    """Hold the file `lock` against other processes (the kernel frees it, even after a kill); Stopped where asked to stop while waiting."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.requested:
                    raise Stopped(f"asked to stop while another process held {lock}") from None
                time.sleep(0.5)
        yield

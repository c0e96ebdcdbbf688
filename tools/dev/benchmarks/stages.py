"""Speed of the shard stage and of the start, and what all benchmarks of stages share."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.config import load as configuration
from pipeline.config.schema import RunConfig
from pipeline.data.workers import write_shards
from pipeline.data.writer import plan_shards
from pipeline.prepare import ROOT
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure, one_thread

NEVER = 10**9  # steps between two validations or checkpoints, more than any run has


def context(folder: Path, ranks: Ranks, stop: StopFlag | None = None) -> Context:
    """Return the context of a stage whose log stays silent."""
    return Context(folder, ranks, stop or StopFlag(), logging.getLogger("cvae.bench"))


def seconds_of(action: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def make_run(folder: Path, config: RunConfig) -> Path:
    """Make a run directory with `config` and return it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(configuration.dump(config))
    return folder


def run_stage(folder: Path, stage: str) -> None:
    """Run one stage with one rank in its own process."""
    command = [sys.executable, "-m", "pipeline.run", str(folder), stage]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


# ---- shard


def shard(bench: Bench) -> dict[str, Result]:
    """Measure the whole shard stage, and the same work on one core."""
    images = len(bench.celeba.names)
    cores = len(os.sched_getaffinity(0))
    folder = bench.folder / "shard"

    def whole_stage() -> float:
        make_run(folder, replace(bench.config, runs_dir=str(folder)))
        seconds = seconds_of(partial(run_stage, folder, "shard"))
        shutil.rmtree(folder)
        return images / seconds

    def one_core() -> float:
        folder.mkdir()
        tasks = plan_shards(bench.celeba, bench.config.shard, folder)
        with one_thread():
            seconds = seconds_of(lambda: list(write_shards(tasks, 1, StopFlag())))
        shutil.rmtree(folder)
        return images / seconds

    contenders: Contenders = {
        f"shard stage, {cores} cores, with start-up": whole_stage,
        "decode, crop, resize, write on one core": one_core,
    }
    measured = measure(contenders, bench.repeats)
    protocol = (
        f"{images} JPEGs (in the page cache) to {bench.config.shard.size} pixels, "
        f"{bench.config.shard.samples_per_shard} per shard, synced to the disk. The stage is its own "
        "process. Its time includes reading the annotations and starting Python and torch in it and in "
        "its workers, which takes the same seconds for any number of images."
    )
    return {"shard": {"title": "Shard stage", "unit": "images/s", "protocol": protocol, **measured}}


# ---- start-up


def startup(bench: Bench) -> dict[str, Result]:
    """Measure the seconds until launch.py has answered."""

    def launch(*arguments: str) -> float:
        command = [sys.executable, "launch.py", *arguments]
        return seconds_of(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True))

    contenders: Contenders = {}
    for word in ("--help", "--dry-run"):
        contenders[f"launch.py {word}"] = partial(launch, word)
    measured = measure(contenders, bench.repeats, warm_up=True)
    protocol = "Wall-clock time of a process from its start to its end; one round of warm-up."
    return {"startup": {"title": "Start-up", "unit": "s", "protocol": protocol, **measured}}

"""Speed of the stages: the train stage against its bare step, its pauses and memory, the shard stage, and starting up."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pipeline.config import load as configuration
from pipeline.config.schema import RunConfig
from pipeline.data.writer import plan_shards, write_shards
from pipeline.prepare import ROOT
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks, process_group
from pipeline.runtime.ports import free_port
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import train as train_stage
from pipeline.tracking.sync import LiveSync
from pipeline.training.saver import Saver
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure, one_thread

UNCOUNTED = 3  # steps of each training: first allocations, filling of the prefetch queue
NEVER = 10**9  # steps between two validations or checkpoints
MEMORY_STEPS = 6
BLOCKS, ROUNDS = 10, 20  # blocks that a repetition is cut into, rounds for each repetition
TRY_AFTER_S = 0.1


class StepClock(StopFlag):
    """Notes when the train stage asks whether to stop, which it does once in every step; says yes from question `last` on."""

    def __init__(self, last: int) -> None:
        self.times: list[float] = []
        self.last = last
        super().__init__()

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Whether `last` questions were asked."""
        self.times.append(time.perf_counter())
        return len(self.times) >= self.last

    @requested.setter
    def requested(self, value: bool) -> None:
        """StopFlag's start value."""


def context(folder: Path, ranks: Ranks, stop: StopFlag | None = None) -> Context:
    """What a stage is given here; its log keeps quiet."""
    return Context(folder, ranks, stop or StopFlag(), logging.getLogger("cvae.bench"))


def seconds_of(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def make_run(folder: Path, config: RunConfig) -> Path:
    """A run directory of `config`."""
    folder.mkdir()
    (folder / "config.yaml").write_text(configuration.dump(config))
    return folder


def run_stage(folder: Path, stage: str) -> None:
    """One stage, one rank, in a process of its own."""
    command = [sys.executable, "-m", "pipeline.run", str(folder), stage]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


# ---- train


def training(config: RunConfig, precision: str, steps: int, deterministic: bool = False) -> RunConfig:
    """`steps` steps without validation or checkpoint before the last, untracked."""
    images = steps * config.train.batch_size
    train = replace(
        config.train,
        precision=precision,
        images=images,
        micro_batch=0,
        val_interval=NEVER,
        checkpoint_interval=NEVER,
    )
    train = replace(train, deterministic=deterministic)
    return replace(config, train=train, tracking=replace(config.tracking, enabled=False))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BareStep:
    """`Trainer.train_step` in a loop on one batch that is ready in memory: what the hardware gives this model."""

    def __init__(self, bench: Bench, precision: str, ranks: Ranks) -> None:
        self.batch_size = bench.config.train.batch_size
        self.trainer = train_stage.Trainer(
            training(bench.config, precision, NEVER), context(bench.folder / precision, ranks)
        )
        self.batch = self.trainer.prepare(0)
        self.rate(UNCOUNTED)
        step_s = self.batch_size / self.rate(UNCOUNTED)
        self.steps = max(4, round(bench.seconds / step_s))  # of a repetition

    def rate(self, steps: int) -> float:
        """Images per second."""
        device = self.trainer.device
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.batch)
        synchronize(device)
        return steps * self.batch_size / (time.perf_counter() - start)


def stage_rate(bench: Bench, precision: str, ranks: Ranks, steps: int, deterministic: bool = False) -> float:
    """Images per second of `steps` steps within a whole train stage, which then stops as on a signal, without a validation."""
    clock, config = StepClock(UNCOUNTED + steps), training(bench.config, precision, NEVER, deterministic)
    folder = make_run(bench.folder / "stage", config)
    with suppress(Stopped):
        train_stage.run(config, context(folder, ranks, clock))
    shutil.rmtree(folder)
    return steps * config.train.batch_size / (clock.times[clock.last - 1] - clock.times[UNCOUNTED - 1])


def refusing_uri() -> str:
    """Of a tracking server that is not there: a port of this host that nobody listens on."""
    return f"http://127.0.0.1:{free_port()}"


def train(bench: Bench) -> dict[str, Result]:
    """Speed of the loop, cost of its pauses, peak memory."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read once when CUDA starts, so for all contenders alike
    with process_group(60, bench.config.train.threads) as ranks:
        bare = {precision: BareStep(bench, precision, ranks) for precision in bench.precisions}
        contenders: Contenders = {}
        for precision, step in bare.items():
            contenders[f"train stage, {precision}"] = partial(stage_rate, bench, precision, ranks, step.steps)
            contenders[f"bare step, {precision}"] = partial(step.rate, step.steps)
        ratios = {(f"train stage, {p}", f"bare step, {p}"): 0.9 for p in bench.precisions}
        if (
            ranks.device.type == "cuda"
        ):  # last of its round: the switch is torch's, and a stage without it turns it off again
            for precision, step in bare.items():
                same = f"train stage, {precision}, deterministic"
                contenders[same] = partial(
                    stage_rate, bench, precision, ranks, step.steps, deterministic=True
                )
                ratios[same, f"train stage, {precision}"] = 0.5
        config, steps = bench.config, " and ".join(f"{step.steps} steps in {p}" for p, step in bare.items())
        what = f"Global batch {config.train.batch_size}, 1 rank, {torch.get_num_threads()} threads, device {ranks.device}. "
        protocol = what + (
            f"{config.name}, {steps} per repetition. Train stage: the stage itself on the shards (order, gathering, prefetching, noise, "
            f"flips, metrics), timed from step to step after {UNCOUNTED} uncounted ones; start-up, validation and checkpoints left out. "
            "Bare step: the same train_step in a loop on one batch that is ready in memory."
        )
        speed = {
            "title": "Train stage",
            "unit": "images/s",
            "protocol": protocol,
            **measure(contenders, bench.repeats, ratios),
        }
        torch.use_deterministic_algorithms(False)
        result = {"train": speed, "train_pauses": pauses(bench, bare["fp32"].trainer, what)}
        result["train_outage"] = outage(bench, bare["fp32"], what)
    del bare
    return result | {"train_memory": memory(bench, what)}


def pauses(bench: Bench, trainer: train_stage.Trainer, what: str) -> Result:
    """Seconds of one checkpoint and of one validation."""
    metrics = MetricsLog(bench.folder / "pauses/metrics.jsonl", None)
    validation = trainer.validate()
    saver = Saver(trainer.checkpoints, metrics.sync)

    def save() -> None:
        trainer.save(saver, metrics, validation)
        synchronize(trainer.device)  # the next step waits in the stream for the copies

    contenders: Contenders = {
        "checkpoint, until training goes on": lambda: seconds_of(save),
        "checkpoint, from then until it is durable": lambda: seconds_of(saver.wait),
        "validation": lambda: seconds_of(trainer.validate),
    }
    measured = measure(contenders, bench.repeats)
    megabytes = max(file.stat().st_size for file in trainer.checkpoints.folder.glob("*.safetensors")) / 1e6
    saver.close()
    protocol = what + (
        f"Checkpoint: {megabytes:.0f} MB (weights, their average, Adam's moments) copied aside; then written, synced and hashed. "
        f"Validation: raw and averaged weights on {len(trainer.held_out.indices)} held-out and {len(trainer.calibration.indices)} "
        "calibration images. "
        f"Unless told otherwise the stage has a checkpoint every {bench.config.train.checkpoint_interval // 2} steps and a validation "
        f"every {bench.config.train.val_interval}."
    )
    return {"title": "Pauses of the train stage", "unit": "s", "protocol": protocol, **measured}


def outage(bench: Bench, step: BareStep, what: str) -> Result:
    """Steps beside the thread that tries to reach a tracking server, which is dead, against steps alone; in short blocks that take turns,
    for the speed of a machine drifts by more than what is looked for."""
    steps, alone, beside = max(1, step.steps // BLOCKS), "steps alone", "steps, tracking server dead"
    tracked = replace(bench.config.tracking, enabled=True, uri=refusing_uri())
    configs = {alone: training(bench.config, "fp32", NEVER), beside: replace(bench.config, tracking=tracked)}
    folders = {
        name: make_run(bench.folder / name.replace(" ", "_"), config) for name, config in configs.items()
    }

    def block(name: str) -> float:
        live = LiveSync(folders[name], TRY_AFTER_S, logging.getLogger("cvae.bench"))
        rate = step.rate(steps)
        live.stop()
        return rate

    measured = measure(
        {name: partial(block, name) for name in folders}, ROUNDS * bench.repeats, {(beside, alone): 0.99}
    )
    protocol = what + (
        f"fp32, blocks of {steps} steps; the thread tries {TRY_AFTER_S:g} s after a block's start, then after twice as long each time "
        "(in a training 20 s, up to 320 s), and once more after its end, which is not counted."
    )
    return {
        "title": "Training without its tracking server",
        "unit": "images/s",
        "protocol": protocol,
        **measured,
    }


def memory(bench: Bench, what: str) -> Result:
    """Peak resident memory of a train stage in a process of its own, and of the GPU where there is one; MiB."""
    peaks: dict[str, float] = {}
    for precision in bench.precisions:
        folder = make_run(
            bench.folder / f"memory_{precision}", training(bench.config, precision, MEMORY_STEPS)
        )
        run_stage(folder, "train")
        done = json.loads((folder / "train/done.json").read_text())
        peaks[f"process, {precision}"] = done["peak_memory_mib"]
        if done["peak_gpu_memory_mib"]:
            peaks[f"GPU, {precision}"] = done["peak_gpu_memory_mib"]
    protocol = (
        what
        + f"ru_maxrss of a train stage of {MEMORY_STEPS} steps, one validation and one checkpoint in a process of its own."
    )
    measured = measure({name: partial(float, peak) for name, peak in peaks.items()}, repeats=1)
    return {"title": "Peak memory of the train stage", "unit": "MiB", "protocol": protocol, **measured}


# ---- shard


def shard(bench: Bench) -> dict[str, Result]:
    """The whole shard stage, and what one core does of it."""
    images, cores, folder = len(bench.celeba.names), len(os.sched_getaffinity(0)), bench.folder / "shard"

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

    names = f"shard stage, {cores} cores, with start-up", "decode, crop, resize, write on one core"
    measured = measure(dict(zip(names, (whole_stage, one_core), strict=True)), bench.repeats)
    protocol = (
        f"{images} JPEGs (in the page cache) to {bench.config.shard.size} pixels, {bench.config.shard.samples_per_shard} per shard, synced "
        "to the disk. The stage is a process of its own: reading the annotations and starting Python and torch in it and in its workers "
        "count, seconds that do not grow with the number of images."
    )
    return {"shard": {"title": "Shard stage", "unit": "images/s", "protocol": protocol, **measured}}


# ---- start-up


def startup(bench: Bench) -> dict[str, Result]:
    """Seconds until launch.py has answered."""

    def launch(*arguments: str) -> float:
        command = [sys.executable, "launch.py", *arguments]
        return seconds_of(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True))

    contenders: Contenders = {f"launch.py {word}": partial(launch, word) for word in ("--help", "--dry-run")}
    measured = measure(contenders, bench.repeats, warm_up=True)
    protocol = "Wall-clock time of a process, from its start to its end; one round of warm-up."
    return {"startup": {"title": "Start-up", "unit": "s", "protocol": protocol, **measured}}

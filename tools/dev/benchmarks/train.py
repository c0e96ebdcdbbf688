"""Speed of training: the train stage against its bare step, pauses, memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from pipeline.config.schema import RunConfig
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.runtime.distributed import Ranks, process_group
from pipeline.runtime.ports import free_port
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import train as train_stage
from pipeline.tracking.sync import LiveSync
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.phases import phase
from pipeline.training.trainer import Trainer
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure
from tools.dev.benchmarks.stages import NEVER, context, make_run, run_stage, seconds_of

UNCOUNTED = 3  # steps of each training: first allocations, filling of the prefetch queue
MEMORY_STEPS = 6
BLOCKS = 10  # a repetition of the outage benchmark is cut into so many blocks
ROUNDS = 20  # rounds of blocks for each repetition
TRY_AFTER_S = 0.1


class StepClock(StopFlag):
    """Notes the time when the train stage asks whether to stop, once per step.

    Answers yes from question `last` on.
    """

    def __init__(self, last: int) -> None:
        self.times: list[float] = []
        self.last = last
        super().__init__()

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """True once `last` questions were asked."""
        self.times.append(time.perf_counter())
        return len(self.times) >= self.last

    @requested.setter
    def requested(self, value: bool) -> None:
        """Ignore the start value of StopFlag."""


def training(config: RunConfig, precision: str, steps: int, deterministic: bool = False) -> RunConfig:
    """Return an untracked configuration of `steps` steps that saves only at the end."""
    images = steps * config.train.batch_size
    train = replace(
        config.train,
        precision=precision,
        images=images,
        micro_batch=0,
        val_interval=NEVER,
        max_lost_steps=NEVER,
        deterministic=deterministic,
    )
    return replace(config, train=train, tracking=replace(config.tracking, enabled=False))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BareStep:
    """`Trainer.train_step` in a loop on one batch in memory: the hardware's speed."""

    def __init__(self, bench: Bench, precision: str, ranks: Ranks) -> None:
        self.batch_size = bench.config.train.batch_size
        config = training(bench.config, precision, NEVER)
        self.trainer = Trainer(phase("train", config), context(bench.folder / precision, ranks))
        self.batch = self.trainer.prepare(0)
        self.rate(UNCOUNTED)
        step_s = self.batch_size / self.rate(UNCOUNTED)
        self.steps = max(4, round(bench.seconds / step_s))  # of a repetition

    def rate(self, steps: int) -> float:
        """Return images per second over `steps` steps."""
        device = self.trainer.device
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.batch)
        synchronize(device)
        return steps * self.batch_size / (time.perf_counter() - start)


def stage_rate(bench: Bench, precision: str, ranks: Ranks, steps: int, deterministic: bool = False) -> float:
    """Return images per second of `steps` steps of a whole train stage.

    The stage stops afterwards as it does on a signal, without a validation.
    """
    clock = StepClock(UNCOUNTED + steps)
    config = training(bench.config, precision, NEVER, deterministic)
    folder = make_run(bench.folder / "stage", config)
    with suppress(Stopped):
        train_stage.run(config, context(folder, ranks, clock))
    shutil.rmtree(folder)
    seconds = clock.times[clock.last - 1] - clock.times[UNCOUNTED - 1]
    return steps * config.train.batch_size / seconds


def refusing_uri() -> str:
    """Return the address of a dead tracking server: a local port that nobody listens on."""
    return f"http://127.0.0.1:{free_port()}"


def train(bench: Bench) -> dict[str, Result]:
    """Measure the speed of the loop, the cost of its pauses, and peak memory."""
    # CUDA reads this once at its start, so it holds for all contenders.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with process_group(60, bench.config.train.threads) as ranks:
        bare = {precision: BareStep(bench, precision, ranks) for precision in bench.precisions}
        contenders: Contenders = {}
        for precision, step in bare.items():
            contenders[f"train stage, {precision}"] = partial(stage_rate, bench, precision, ranks, step.steps)
            contenders[f"bare step, {precision}"] = partial(step.rate, step.steps)
        ratios = {(f"train stage, {p}", f"bare step, {p}"): 0.9 for p in bench.precisions}
        if ranks.device.type == "cuda":
            # Last in the round: the next plain stage turns torch's global switch off again.
            for precision, step in bare.items():
                same = f"train stage, {precision}, deterministic"
                contenders[same] = partial(
                    stage_rate, bench, precision, ranks, step.steps, deterministic=True
                )
                ratios[same, f"train stage, {precision}"] = 0.5
        config = bench.config
        steps = " and ".join(f"{step.steps} steps in {p}" for p, step in bare.items())
        what = (
            f"Global batch {config.train.batch_size}, 1 rank, {torch.get_num_threads()} threads, "
            f"device {ranks.device}. "
        )
        protocol = what + (
            f"{config.name}, {steps} per repetition. Train stage: the stage itself on the shards (order, "
            f"gathering, prefetching, noise, flips, metrics), timed from step to step after {UNCOUNTED} "
            "uncounted steps, without start-up, validation and checkpoints. Bare step: the same "
            "train_step in a loop on one batch in memory."
        )
        measured = measure(contenders, bench.repeats, ratios)
        speed = {"title": "Train stage", "unit": "images/s", "protocol": protocol, **measured}
        torch.use_deterministic_algorithms(False)
        result = {"train": speed, "train_pauses": pauses(bench, bare["fp32"].trainer, what)}
        result["train_outage"] = outage(bench, bare["fp32"], what)
    del bare
    return result | {"train_memory": memory(bench, what)}


def pauses(bench: Bench, trainer: Trainer, what: str) -> Result:
    """Measure the seconds of one checkpoint and of one validation."""
    metrics = MetricsLog(bench.folder / "pauses/metrics.jsonl", None)
    validation = trainer.validate()
    saver = Saver(trainer.checkpoints, metrics.sync)

    def save() -> None:
        metrics.append(trainer.step, validation)
        saver.save(trainer.step, trainer.state(), trainer.meta(validation))
        synchronize(trainer.device)  # the next step would wait for these copies

    contenders: Contenders = {
        "checkpoint, until training goes on": lambda: seconds_of(save),
        "checkpoint, from then until it is durable": lambda: seconds_of(saver.wait),
        "validation": lambda: seconds_of(trainer.validate),
    }
    measured = measure(contenders, bench.repeats)
    sizes = [file.stat().st_size for file in trainer.checkpoints.folder.glob("*.safetensors")]
    megabytes = max(sizes) / 1e6
    saver.close()
    inputs = trainer.inputs
    protocol = what + (
        f"Checkpoint: {megabytes:.0f} MB (weights, their average, Adam's moments) copied, then written, "
        f"synced and hashed. Validation: raw and averaged weights on {len(inputs.held_out.indices)} "
        f"held-out and {len(inputs.calibration.indices)} calibration images. By default the stage writes "
        f"a checkpoint every {bench.config.train.max_lost_steps // 2} steps and validates every "
        f"{bench.config.train.val_interval}."
    )
    return {"title": "Pauses of the train stage", "unit": "s", "protocol": protocol, **measured}


def outage(bench: Bench, step: BareStep, what: str) -> Result:
    """Compare steps beside the thread that tries to reach a dead tracking server with steps alone.

    Short blocks of steps take turns, because the speed of a machine drifts by more than the effect.
    """
    alone = "steps alone"
    beside = "steps, tracking server dead"
    steps = max(1, step.steps // BLOCKS)
    tracked = replace(bench.config.tracking, enabled=True, uri=refusing_uri())
    configs = {alone: training(bench.config, "fp32", NEVER), beside: replace(bench.config, tracking=tracked)}
    folders = {}
    for name, config in configs.items():
        folders[name] = make_run(bench.folder / name.replace(" ", "_"), config)

    def block(name: str) -> float:
        live = LiveSync(folders[name], TRY_AFTER_S, logging.getLogger("cvae.bench"))
        rate = step.rate(steps)
        live.stop()
        return rate

    contenders: Contenders = {name: partial(block, name) for name in folders}
    measured = measure(contenders, ROUNDS * bench.repeats, {(beside, alone): 0.99})
    protocol = what + (
        f"fp32, blocks of {steps} steps. The thread tries {TRY_AFTER_S:g} s after a block's start, then "
        "after twice as long each time (in a training 20 s, up to 320 s), and once more after the block, "
        "which does not count."
    )
    title = "Training without its tracking server"
    return {"title": title, "unit": "images/s", "protocol": protocol, **measured}


def memory(bench: Bench, what: str) -> Result:
    """Measure the peak memory, in MiB, of a train stage in its own process and of the GPU."""
    peaks: dict[str, float] = {}
    for precision in bench.precisions:
        config = training(bench.config, precision, MEMORY_STEPS)
        folder = make_run(bench.folder / f"memory_{precision}", config)
        run_stage(folder, "train")
        done = json.loads((folder / "train/done.json").read_text())
        peaks[f"process, {precision}"] = done["peak_memory_mib"]
        if done["peak_gpu_memory_mib"]:
            peaks[f"GPU, {precision}"] = done["peak_gpu_memory_mib"]
    protocol = what + (
        f"ru_maxrss of a train stage of {MEMORY_STEPS} steps, one validation and one checkpoint in its own "
        "process."
    )
    measured = measure({name: partial(float, peak) for name, peak in peaks.items()}, repeats=1)
    return {"title": "Peak memory of the train stage", "unit": "MiB", "protocol": protocol, **measured}

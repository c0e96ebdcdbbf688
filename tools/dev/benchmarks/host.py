"""What a step costs the host: its time where arithmetic vanishes, its operations, its random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from torch.profiler import profile

from pipeline.config.load import with_values
from pipeline.data.loader import Batch
from pipeline.data.order import NEWEST_STREAM, STREAMS
from pipeline.runtime.distributed import Ranks
from pipeline.stages import shard as shard_stage
from pipeline.training.phases import phase
from pipeline.training.trainer import Trainer
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure, one_thread
from tools.dev.benchmarks.stages import NEVER, context

SMALL = {"shard.size": 8, "model.net.channels": [32, 64], "train.batch_size": 1}  # arithmetic vanishes
STEPS = 50  # of a repetition
FULL_S = 1.0  # a shorter repetition leaves out the compiled step, for tests
MOST_OPERATIONS = 1_800  # dispatched in an eager step
SHARE, WIDTH = 128, 128  # images of a rank, numbers of an image
SHARDS = [2048] * 79 + [978]  # of CelebA's training split
RANKS = (1, 8, 64, 512)


def host(bench: Bench) -> dict[str, Result]:
    """Measure a step's time on the host, its operations, and order and noise on many simulated ranks."""
    with one_thread():
        return steps(bench) | {"order": order_and_noise(bench)}


def operations(step: Callable[[], object]) -> int:
    """Return how many operations one call dispatches, those that others call included (torch.profiler)."""
    with profile() as trace:
        step()
    return sum(event.name.startswith("aten::") for event in trace.events())


def milliseconds(action: Callable[[int], object]) -> float:
    """Return the mean time of `action(0)`, `action(1)`, ..."""
    start = time.perf_counter()
    for i in range(STEPS):
        action(i)
    return 1000 * (time.perf_counter() - start) / STEPS


def one_step(trainer: Trainer, batch: Batch, _: int) -> None:
    """Make one training step on `batch`."""
    trainer.train_step(batch)


def count(step: Callable[[], object]) -> float:
    """Return `operations` as a figure of a benchmark."""
    return float(operations(step))


def steps(bench: Bench) -> dict[str, Result]:
    """Measure milliseconds of a step, one image of 8 pixels, and operations of a step."""
    small = with_values(bench.config, SMALL)
    small = replace(small, tracking=replace(small.tracking, enabled=False))
    shard_stage.run(small, context(bench.folder, Ranks()))
    contenders: Contenders = {}
    counts: Contenders = {}
    for mode in ("eager", "compiled") if bench.seconds >= FULL_S else ("eager",):
        config = replace(small, train=replace(small.train, step=mode, images=NEVER))
        trainer = Trainer(phase("train", config), context(bench.folder / f"host_{mode}", Ranks()))
        batch = trainer.prepare(0)
        contenders[f"step, {mode}"] = partial(milliseconds, partial(one_step, trainer, batch))
        counts[f"step, {mode}"] = partial(count, partial(one_step, trainer, batch, 0))
    ratios = {("step, eager", "step, compiled"): 1.5} if len(contenders) > 1 else None
    measured = measure(contenders, bench.repeats, ratios, warm_up=True)
    counted = measure(counts, repeats=1)
    protocol = (
        f"{small.name} with two convolutions, one image of 8 pixels, one thread, {STEPS} steps of one batch "
        f"in memory for each repetition, device {trainer.device}."
    )
    count_protocol = (
        "One of these steps under torch.profiler; operations that others call are included. Target: at most "
        f"{MOST_OPERATIONS:,} in an eager step."
    )
    timed = {"title": "Host cost of a step", "unit": "ms", "protocol": protocol, **measured}
    total = {"title": "Operations of a step", "unit": "operations", "protocol": count_protocol, **counted}
    return {"host": timed, "operations": total}


def order_and_noise(bench: Bench) -> Result:
    """Measure the milliseconds in which a rank computes order, flips and noise of its share."""
    bounds = np.cumsum([0, *SHARDS])

    def of_step(ranks: int, step: int) -> None:
        first = (step * ranks + ranks // 2) * SHARE  # the share of the rank in the middle
        positions = range(first, first + SHARE)
        streams[ranks].indices(positions)
        streams[ranks].augmentation(positions)
        streams[ranks].noise(positions, WIDTH)

    streams = {}
    contenders: Contenders = {}
    for ranks in RANKS:
        streams[ranks] = STREAMS[NEWEST_STREAM](bounds, 0, bench.config.data.shards_at_once, ranks * SHARE)
        contenders[f"{ranks} ranks"] = partial(milliseconds, partial(of_step, ranks))
    ratios = {("1 ranks", f"{ranks} ranks"): 0.8 for ranks in RANKS[1:]}
    measured = measure(contenders, bench.repeats, ratios, warm_up=True)
    protocol = (
        f"Order, flips and {WIDTH} normal numbers for each of {SHARE} images of a rank, {STEPS} steps a "
        f"repetition, {sum(SHARDS):,} images in {len(SHARDS)} shards. The global batch is {SHARE} times the "
        "simulated ranks; one rank is timed."
    )
    return {"title": "Order and noise of a step", "unit": "ms", "protocol": protocol, **measured}

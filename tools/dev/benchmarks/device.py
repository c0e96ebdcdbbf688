"""A step on a GPU: eager and captured, the same losses, its roofline, and the wait for data."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.runtime.distributed import Ranks, process_group
from pipeline.stages import train as train_stage
from pipeline.training.phases import phase
from pipeline.training.trainer import Trainer
from tools.dev.benchmarks.harness import Bench, Contenders, Result, endless_rate, measure, synchronize
from tools.dev.benchmarks.stages import NEVER, context, make_run
from tools.dev.benchmarks.train import UNCOUNTED, training

MODES = ("eager", "graph")  # compiling takes minutes and may be measured with the part `host`
STEPS = 100  # whose losses are compared
LARGE_BATCH = 1024
WAIT_STEPS = 400  # of a train stage whose waits are measured
WARM = 20  # steps before a clock starts: eager steps, the capture, and a few replays
GRAPH_GAIN = 5.0  # target: a graph against eager steps at the usual batch
SHARE_OF_ROOFLINE = 0.4  # target at the large batch
VIEWS = ("view", "as_strided", "expand", "permute", "transpose", "slice", "select", "detach", "t.", "alias")


def device(bench: Bench) -> dict[str, Result]:
    """Measure what only a GPU shows. Without one there is nothing to measure."""
    if not torch.cuda.is_available():
        return {}
    with process_group(60, bench.config.train.threads) as ranks:
        results = {"modes": modes(bench, ranks), "same_losses": same_losses(bench, ranks)}
        results |= roofline(bench, ranks)
        return results | {"data_wait": data_wait(bench, ranks)}


def trainer_of(bench: Bench, ranks: Ranks, mode: str, precision: str, batch: int, **changes: Any) -> Trainer:
    """Return a trainer whose steps run in `mode`."""
    config = training(bench.config, precision, NEVER)
    train = replace(config.train, batch_size=batch, images=NEVER * batch, step=mode, **changes)
    folder = bench.folder / f"{mode}_{precision}_{batch}"
    return Trainer(phase("train", replace(config, train=train)), context(folder, ranks))


def rate(trainer: Trainer, seconds: float) -> float:
    """Return images per second of steps on one batch in memory; the device is waited for at the end only."""
    batch = trainer.prepare(0)
    for _ in range(WARM):
        trainer.train_step(batch)
    synchronize()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(WARM):
            trainer.train_step(batch)
        synchronize()
        steps += WARM
    return steps * trainer.config.train.batch_size / (time.perf_counter() - start)


def modes(bench: Bench, ranks: Ranks) -> Result:
    """Compare the ways in which a step may run, at the usual batch."""
    batch = bench.config.train.batch_size
    contenders: Contenders = {}
    ratios = {}
    for precision in bench.precisions:
        eager = f"eager, {precision}"
        for mode in MODES:
            trainer = trainer_of(bench, ranks, mode, precision, batch)
            contenders[f"{mode}, {precision}"] = partial(rate, trainer, bench.seconds)
            if mode != "eager":
                ratios[f"{mode}, {precision}", eager] = GRAPH_GAIN
    measured = measure(contenders, bench.repeats, ratios)
    protocol = (
        f"{bench.config.name}, batch {batch}, one rank, one batch in memory, {bench.seconds:g} s each time. "
        "'graph' captures the whole step once and replays it."
    )
    return {"title": "Ways of a step", "unit": "images/s", "protocol": protocol, **measured}


def losses(trainer: Trainer) -> Tensor:
    """Return the losses of the first STEPS steps, float64 [STEPS]."""
    found = []
    for step in range(STEPS):
        record = trainer.train_step(trainer.prepare(step))
        found.append(record.numbers[record.names.index("loss")].cpu())
    return torch.stack(found)


def same_losses(bench: Bench, ranks: Ranks) -> Result:
    """Compare the losses of a captured step with those of eager steps, in float32."""
    batch = bench.config.train.batch_size
    found = {}
    for mode in MODES:
        found[mode] = losses(trainer_of(bench, ranks, mode, "fp32", batch, deterministic=True))
    torch.use_deterministic_algorithms(False)
    difference = float(((found["graph"] - found["eager"]).abs() / found["eager"].abs()).max())
    measured = measure({"graph against eager": lambda: difference}, repeats=1)
    protocol = f"Largest relative difference of the loss over {STEPS} steps of {batch} images, fp32."
    return {"title": "Losses of the ways of a step", "unit": "", "protocol": protocol, **measured}


# ---- roofline


class Work(TorchDispatchMode):
    """Counts the floating-point operations and the bytes of every operation that runs inside.

    The bytes are those of an operation's tensors, each read or written once; views cost nothing. So the
    seconds of `floor` are what the operations of an unfused step need at least.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int, float]] = []  # name, floating-point operations, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note its work."""
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if any(f"aten.{view}" in name for view in VIEWS):
            return result
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
        moved = 0
        for tensor in tensors_in((args, kwargs, result)):
            moved += tensor.numel() * tensor.element_size()
        self.operations.append((name, int(flops), float(moved)))
        return result

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the seconds that all operations need: the slower of arithmetic and memory, for each."""
        return sum(max(flops / flops_per_s, moved / bytes_per_s) for _, flops, moved in self.operations)


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return []
    found: list[Tensor] = []
    for item in value:
        found += tensors_in(item)
    return found


def ceilings(dtype: torch.dtype, on: torch.device) -> tuple[float, float]:
    """Measure floating-point operations per second of a matrix product, and bytes per second of a copy."""
    n = 8192
    left, right = (torch.randn(n, n, device=on, dtype=dtype) for _ in range(2))
    product = median(endless_rate(lambda: left @ right, 0.3, 2 * n**3) for _ in range(3))
    source = torch.randn(2**28, device=on)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    copied = median(endless_rate(lambda: target.copy_(source), 0.3, moved) for _ in range(3))
    return product, copied


def roofline(bench: Bench, ranks: Ranks) -> dict[str, Result]:
    """Compare a step at the large batch with the least time that its work needs on this card."""
    flops_per_s, bytes_per_s = ceilings(torch.bfloat16, ranks.device)
    work = Work()
    eager = trainer_of(bench, ranks, "eager", "bf16", LARGE_BATCH)
    batch = eager.prepare(0)
    for _ in range(UNCOUNTED):
        eager.train_step(batch)
    with work:
        eager.train_step(batch)
    flops = sum(f for _, f, _ in work.operations)
    moved = sum(b for _, _, b in work.operations)
    floor_s = work.floor(flops_per_s, bytes_per_s)
    contenders: Contenders = {}
    floors: dict[str, Callable[[], float]] = {"roofline of its operations": lambda: LARGE_BATCH / floor_s}
    for mode in MODES:
        trainer = trainer_of(bench, ranks, mode, "bf16", LARGE_BATCH)
        contenders[f"{mode}, bf16, batch {LARGE_BATCH}"] = partial(rate, trainer, bench.seconds)
    ratios = {(name, "roofline of its operations"): SHARE_OF_ROOFLINE for name in contenders}
    measured = measure(contenders | floors, bench.repeats, ratios)
    protocol = (
        f"{bench.config.name}, bf16. An eager step of {LARGE_BATCH} images calls {len(work.operations)} "
        f"operations with {flops / 1e12:.3f} TFLOP and {moved / 1e9:.1f} GB (each tensor of each operation "
        f"once). This card does {flops_per_s / 1e12:.0f} TFLOP/s (8192 x 8192 product, bf16) and "
        f"{bytes_per_s / 1e12:.2f} TB/s (copy, both directions). Each operation needs the larger of its two "
        f"times; together {1000 * floor_s:.2f} ms. Fused operations move less, so they can exceed it."
    )
    return {"roofline": {"title": "Roofline of a step", "unit": "images/s", "protocol": protocol, **measured}}


def data_wait(bench: Bench, ranks: Ranks) -> Result:
    """Measure the share of time in which a whole train stage waits for data."""
    contenders: Contenders = {}
    for size in (bench.config.train.batch_size, LARGE_BATCH):
        contenders[f"batch {size}"] = partial(waiting, bench, ranks, size)
    measured = measure(contenders, repeats=1)
    protocol = (
        f"Percent of the time of {WAIT_STEPS} steps of a train stage in which the loop waits for the next "
        "batch (data_wait_share), graph, bf16, median of the windows after the first two. Target: below 1 %."
    )
    return {"title": "Waiting for data", "unit": "%", "protocol": protocol, **measured}


def waiting(bench: Bench, ranks: Ranks, batch: int) -> float:
    """Return the percentage of time that a train stage waits for data."""
    config = training(bench.config, "bf16", WAIT_STEPS)
    images = WAIT_STEPS * batch
    train = replace(config.train, batch_size=batch, images=images, step="graph", log_interval=20)
    config = replace(config, train=train)
    folder = make_run(bench.folder / "waiting", config)
    train_stage.run(config, context(folder, ranks))
    shares = []
    for line in (folder / "train/metrics.jsonl").read_text().splitlines():
        values = json.loads(line)["values"]
        if "train/data_wait_share" in values:
            shares.append(values["train/data_wait_share"])
    shutil.rmtree(folder)
    return 100 * median(shares[2:])

"""One rank of the measurement of tools/dev/scaling.py: the parts of a step, and the step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.distributed import all_reduce

from pipeline.config import load as configuration
from pipeline.runtime.distributed import process_group
from pipeline.training.phases import phase
from pipeline.training.trainer import Trainer
from tools.dev.benchmarks.stages import NEVER, context
from tools.dev.benchmarks.train import training

UNCOUNTED = 2  # calls


def seconds(action: Callable[[int], object], calls: int) -> float:
    """Return the median seconds of an action, which gets the number of the call."""
    values = []
    for i in range(calls + UNCOUNTED):
        start = time.perf_counter()
        action(i)
        values.append(time.perf_counter() - start)
    return median(values[UNCOUNTED:])


def main() -> None:
    """Measure and let rank 0 write the seconds (all ranks)."""
    folder, calls = Path(sys.argv[1]), int(sys.argv[2])
    config = training(configuration.load([folder / "config.yaml"]), "fp32", NEVER)
    with process_group(120, threads=1) as ranks:
        trainer = Trainer(phase("train", config), context(folder, ranks))
        batch = trainer.prepare(0)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        gradient = torch.zeros(parameters, device=ranks.device)
        sums = torch.zeros(6, dtype=torch.float64, device=ranks.device)
        measured = {
            "step": seconds(lambda i: trainer.train_step(batch), calls),
            "load": seconds(trainer.prepare, calls),
            "gradients": seconds(lambda i: all_reduce(gradient), calls) if ranks.world_size > 1 else 0.0,
            "sums": seconds(lambda i: ranks.reduce_sum(sums), calls),
            "gradient_bytes": 4.0 * parameters,
        }
        if ranks.is_main:
            (folder / "seconds.json").write_text(json.dumps(measured))
        ranks.barrier()


if __name__ == "__main__":
    main()

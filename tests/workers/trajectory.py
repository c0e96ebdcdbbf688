"""One rank of a training of 15 steps in each run directory of the arguments.

It notes raw gradients, their norms, losses and weights.
"""

import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.config import load as configuration
from pipeline.data.loader import Prefetcher
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import process_group
from pipeline.runtime.preempt import StopFlag
from pipeline.training.phases import phase
from pipeline.training.trainer import Trainer

STEPS = 15
GRADIENTS_OF = (0, 1, STEPS - 1)


def trajectory(run_dir: Path, ranks) -> None:
    """Write run_dir/rank<r>.safetensors."""
    config = configuration.load([run_dir / "config.yaml"])
    trainer = Trainer(phase("train", config), Context(run_dir, ranks, StopFlag(), logging.getLogger("test")))
    notes: dict[str, torch.Tensor] = {}
    clip = trainer.arithmetic._clip

    def note_gradients(gradient):
        if trainer.step in GRADIENTS_OF:
            for name, p in trainer.weights.tensors.items():
                notes[f"grad{trainer.step}.{name}"] = p.grad.clone().contiguous()
        return clip(gradient)

    trainer.arithmetic._clip = note_gradients
    records, indices = [], []
    for batch in Prefetcher(trainer.prepare, 0, STEPS):
        record = trainer.train_step(batch)
        records.append(record.numbers)
        indices.append(torch.from_numpy(record.indices))
    notes["records"] = torch.stack(records)
    notes["indices"] = torch.stack(indices)
    notes |= {f"model.{k}": v.clone().contiguous() for k, v in trainer.model.state_dict().items()}
    notes |= {f"ema.{k}": v.clone().contiguous() for k, v in trainer.ema.model.state_dict().items()}
    values = trainer.validate()
    notes["validation"] = torch.tensor(list(values.values()), dtype=torch.float64)
    save_file(notes, run_dir / f"rank{ranks.rank}.safetensors")


with process_group(timeout_s=60, threads=1) as ranks:
    for folder in sys.argv[1:]:
        trajectory(Path(folder), ranks)

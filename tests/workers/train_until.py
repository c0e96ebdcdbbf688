"""One rank of a stage of RUN_DIR (`train` unless named); with STEP, the last rank is asked to stop there."""

import sys
from pathlib import Path

from pipeline.run import run_stage
from pipeline.runtime.preempt import Stopped
from pipeline.training import loop

run_dir = Path(sys.argv[1])
stop_at = int(sys.argv[2]) if len(sys.argv) > 2 else None
stage = sys.argv[3] if len(sys.argv) > 3 else "train"
train_step = loop.Trainer.train_step


def step_and_maybe_ask(self, batch):
    if self.step == stop_at and self.ranks.rank == self.ranks.world_size - 1:
        self.stop.requested = True
    return train_step(self, batch)


loop.Trainer.train_step = step_and_maybe_ask
try:
    run_stage(run_dir, stage)
except Stopped as reason:
    print("stopped:", reason)

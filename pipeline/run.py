"""Enter one stage in one process: `torchrun -m pipeline.run RUN_DIR STAGE` (or `python -m pipeline.run`)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from pipeline import config as configuration
from pipeline.errors import ConfigError, exit_code
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import STAGES


def run_stage(run_dir: Path, stage: str, stop: StopFlag | None = None) -> None:
    """Run `stage` of the run in `run_dir` on this rank (all ranks call it).

    Reads run_dir/config.yaml and the variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    `stop`: a flag that listens already, for a caller that wants to know afterwards which signals came.
    Raises ConfigError where the run or the stage is unknown, Stopped after a stop signal was honoured.
    """
    if stop is None:
        with StopFlag() as stop:  # before torch is imported, which takes seconds
            return run_stage(run_dir, stage, stop)
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}, expected one of {', '.join(STAGES)}")
    file = run_dir / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{run_dir}: no config.yaml in it, so it is not a run directory; `launch.py` makes one")
    config = configuration.load([file])
    if config.train.deterministic:  # read by cuBLAS when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from pipeline.runtime.context import Context
    from pipeline.runtime.distributed import process_group
    from pipeline.runtime.logs import stage_logger

    with process_group(config.train.timeout_s, config.train.threads) as ranks:
        context = Context(run_dir, ranks, stop, stage_logger(stage, run_dir, ranks.rank))
        STAGES[stage].run(config, context)


def main() -> None:
    """Command line of one rank."""
    parser = argparse.ArgumentParser(prog="pipeline.run", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run directory that holds config.yaml")
    parser.add_argument("stage", help=f"one of {', '.join(STAGES)}")
    args = parser.parse_args()
    try:
        run_stage(args.run_dir.absolute(), args.stage)
    except Stopped:
        sys.exit(128 + signal.SIGTERM)  # neither done nor failed: the same command continues it


if __name__ == "__main__":
    sys.exit(exit_code(main))

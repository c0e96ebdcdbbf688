"""Enter one stage in one process: `torchrun -m pipeline.run RUN_DIR STAGE` (or `python -m pipeline.run`)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from pipeline.config import load as configuration
from pipeline.errors import ConfigError, exit_code
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import STAGES


def run_stage(
    run_dir: Path,
    stage: str,
    stop: StopFlag | None = None,
    part: tuple[int, int] | None = None,
    job: str = "",
) -> None:
    """Run `stage` of the run in `run_dir` on this rank (all ranks call it).

    Reads run_dir/config.yaml and the variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    `stop`: a flag that listens already, for a caller that wants to know afterwards which signals came.
    `part`: (k, n), only the k-th of n parts of a stage that can be split; the whole stage afterwards completes it.
    `job`: the scheduler's name of this job, for messages.
    Raises ConfigError where the run or the stage is unknown, Stopped after a stop signal was honoured.
    """
    if stop is None:
        with StopFlag() as stop:  # before torch is imported, which takes seconds
            return run_stage(run_dir, stage, stop, part, job)
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}, expected one of {', '.join(STAGES)}")
    if part and not (STAGES[stage].splits and 0 <= part[0] < part[1]):
        raise ConfigError(f"part {part[0]} of {part[1]}: expected a stage that can be split and 0 <= k < n")
    file = run_dir / "config.yaml"
    if not file.exists():
        raise ConfigError(
            f"{run_dir}: no config.yaml in it, so it is not a run directory; `launch.py` makes one"
        )
    config = configuration.load([file])
    if config.train.deterministic:  # read by cuBLAS when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from pipeline.runtime.context import Context
    from pipeline.runtime.distributed import process_group
    from pipeline.runtime.logs import stage_log

    with (
        process_group(config.train.timeout_s, config.train.threads) as ranks,
        stage_log(stage, run_dir, ranks.rank, part) as log,
    ):
        context = Context(run_dir, ranks, stop, log, part, job)
        try:
            STAGES[stage].run(config, context)
        except Stopped as reason:
            context.log.info("stopped: %s", reason)
            raise


def parse_part(text: str | None) -> tuple[int, int] | None:
    """'2/8' -> (2, 8); raises ConfigError."""
    if text is None:
        return None
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal()):
        raise ConfigError(f"--part {text}: expected K/N, e.g. 0/4")
    return int(k), int(n)


def main() -> None:
    """Command line of one rank."""
    parser = argparse.ArgumentParser(prog="pipeline.run", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run directory that holds config.yaml")
    parser.add_argument("stage", help=f"one of {', '.join(STAGES)}")
    parser.add_argument(
        "--part", metavar="K/N", help="the K-th of N parts (from 0) of a stage that can be split: shard"
    )
    args = parser.parse_args()
    try:
        run_stage(args.run_dir.absolute(), args.stage, part=parse_part(args.part))
    except Stopped:
        sys.exit(128 + signal.SIGTERM)  # neither done nor failed: the same command continues it


if __name__ == "__main__":
    sys.exit(exit_code(main))

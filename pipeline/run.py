"""Run one stage in one process: `torchrun -m pipeline.run RUN_DIR STAGE` (or `python -m pipeline.run`)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from pipeline.command_line import add_run_dir, parser
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, exit_code
from pipeline.rundir.record import run_config
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import STAGES

EXAMPLES = """\
  python -m pipeline.run runs/sigma_cvae_nf shard
  torchrun --nproc-per-node 4 -m pipeline.run runs/sigma_cvae_nf train
"""


def run_stage(
    run_dir: Path,
    stage: str,
    stop: StopFlag | None = None,
    part: tuple[int, int] | None = None,
    job: str = "",
    config_file: Path | None = None,
) -> None:
    """Run `stage` of the run in `run_dir` on this rank (all ranks call it).

    Reads run_dir/config.yaml, or the `config_file` of an evaluation with its own settings, and the variables
    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    `stop`: a flag that already listens, for a caller that asks afterwards which signals came.
    `part`: (k, n) runs only part k of n of a stage that can be split; the whole stage later completes it.
    `job`: the scheduler's name of this job, for messages.
    Raises ConfigError if the run or the stage is unknown, Stopped after a stop signal.
    """
    if stop is None:
        with StopFlag() as stop:  # it listens before torch is imported, which takes seconds
            return run_stage(run_dir, stage, stop, part, job, config_file)
    _require_stage(stage, part)
    config = run_config(run_dir, config_file)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    _run(config, run_dir, stage, stop, part, job)


def _require_stage(stage: str, part: tuple[int, int] | None) -> None:
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}, expected one of {', '.join(STAGES)}")
    if part is None:
        return
    k, n = part
    if not STAGES[stage].splits or not 0 <= k < n:
        raise ConfigError(f"part {k} of {n}: expected a stage that can be split and 0 <= k < n")


def _run(
    config: RunConfig,
    run_dir: Path,
    stage: str,
    stop: StopFlag,
    part: tuple[int, int] | None,
    job: str,
) -> None:
    """Join the process group, open the log, and run the stage (all ranks)."""
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
            log.info("stopped: %s", reason)
            raise


def sync_evaluation(run_dir: Path, stage: str) -> None:
    """Send a new evaluation to the tracker (rank 0 only), where no launcher waits that would do it."""
    if stage == "eval" and os.environ.get("RANK", "0") == "0":
        from pipeline.tracking.sync import sync_run

        sync_run(run_dir)


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Parse '2/8' to (2, 8), and None to None; raises ConfigError."""
    if text is None:
        return None
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal()):
        raise ConfigError(f"--part {text}: expected K/N, e.g. 0/4")
    return int(k), int(n)


def main() -> None:
    """Run the command line of one rank."""
    words = parser("pipeline.run", __doc__, EXAMPLES)
    add_run_dir(words)
    words.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    words.add_argument(
        "--part", metavar="K/N", help="part K (from 0) of N parts of a stage that can be split: shard"
    )
    args = words.parse_args()
    run_dir = args.run_dir.absolute()
    try:
        run_stage(run_dir, args.stage, part=parse_part(args.part))
        sync_evaluation(run_dir, args.stage)
    except Stopped:
        sys.exit(128 + signal.SIGTERM)  # neither done nor failed: the same command continues it


if __name__ == "__main__":
    sys.exit(exit_code(main))

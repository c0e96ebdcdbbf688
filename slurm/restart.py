"""Whether a job that crashed is to be restarted: asked by the batch script before it ends, so that dependents never see it fail.

Exit code 0 means: requeue me. Slurm itself requeues after node failures and preemptions, submitit after the time limit;
what is left is a rank that died, which to Slurm is a failure that cancels all dependents at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.rundir.record import read_json, run_config
from pipeline.stages import STAGES
from slurm import ledger


def wanted(run_dir: Path, stage: str, job_id: str, code: int) -> bool:
    """Note the crash and say whether another attempt makes sense: neither a user's mistake nor a crash that comes again and again."""
    error = ledger.failure(run_dir, stage)
    if error and error["user"]:
        return False
    config = run_config(run_dir)
    now = STAGES[stage].progress(config, run_dir)
    crashes = ledger.crashed(run_dir, stage, job_id, now, code)
    in_place = next((i for i, progress in enumerate(reversed(crashes)) if progress != now), len(crashes))
    limits = config.cluster
    if in_place >= limits.max_crashes:
        reason = f"{in_place} crashes in a row without progress (at {now}), so it is not started again (cluster.max_crashes)"
    elif len(crashes) > limits.max_restarts:
        reason = f"crashed {len(crashes)} times, so it is not started again (cluster.max_restarts)"
    else:
        print(
            f"{stage}: crash {len(crashes)}, exit code {code}, saved progress {now}: the job is requeued",
            file=sys.stderr,
            flush=True,
        )
        return True
    ledger.note_end_of_restarts(run_dir, stage, job_id, reason)
    print(f"{stage}: {reason}", file=sys.stderr, flush=True)
    return False


def main() -> int:
    """`python -m slurm.restart FOLDER CODE` in the batch script: `FOLDER/steps.json` tells what the job was doing."""
    folder, code = Path(sys.argv[1]), int(sys.argv[2])
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job_id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ["SLURM_JOB_ID"]
    step = read_json(folder / "steps.json")[int(task or 0)]
    return 0 if wanted(Path(step["run_dir"]), step["stage"], job_id, code) else 1


if __name__ == "__main__":
    sys.exit(main())

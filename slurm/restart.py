"""Decide whether a job that crashed is restarted. Its batch script asks before it ends.

Exit code 0 means: requeue me. Slurm requeues a job after a node failure or a preemption, and submitit
after the time limit. To Slurm a rank that died is a failure that cancels all dependents at once, so this
decision must be made before the job ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.rundir.record import read_json, run_config
from pipeline.stages import STAGES
from slurm import ledger
from slurm.resources import stage_resources

REFUSED_BY_SUBMITIT = "UncompletedJobError"  # submitit does not requeue a job after its last time limit


def wanted(run_dir: Path, stage: str, job_id: str, code: int, logs: Path) -> bool:
    """Record the crash and say whether to try again.

    A user's mistake is not tried again, nor is a job that crashes repeatedly without progress.
    `logs`: folder of the submission.
    """
    ledger.note_silent_end(run_dir, stage, logs, job_id)
    error = ledger.failure(run_dir, stage, job_id)
    if error and error["user"]:
        return False
    if error and error["kind"] == REFUSED_BY_SUBMITIT:
        reason = "timed out more often than cluster.max_timeouts allows; start the stage again to go on"
        ledger.note_end_of_restarts(run_dir, stage, job_id, reason)
        _say(f"{stage}: {reason}")
        return False
    config = run_config(run_dir)
    progress = STAGES[stage].progress(config, run_dir)
    crashes = ledger.crashed(run_dir, stage, job_id, progress, code)
    limits = stage_resources(config, stage)
    reason = _reason_to_stop(crashes, limits.max_crashes, limits.max_restarts)
    if not reason:
        _say(
            f"{stage}: crash {len(crashes)}, exit code {code}, saved progress {progress}: the job is requeued"
        )
        return True
    ledger.note_end_of_restarts(run_dir, stage, job_id, reason)
    _say(f"{stage}: {reason}")
    return False


def _reason_to_stop(crashes: list[int], max_crashes: int, max_restarts: int) -> str:
    """Return why there is no further attempt, or "". `crashes`: the progress at each crash so far."""
    progress = crashes[-1]
    in_place = 0
    for earlier in reversed(crashes):
        if earlier != progress:
            break
        in_place += 1
    if in_place >= max_crashes:
        return (
            f"{in_place} crashes in a row without progress (at {progress}), so it is not started again "
            "(cluster.max_crashes)"
        )
    if len(crashes) > max_restarts:
        return f"crashed {len(crashes)} times, so it is not started again (cluster.max_restarts)"
    return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Run `python -m slurm.restart FOLDER CODE`; FOLDER/steps.json says what the job was doing."""
    folder = Path(sys.argv[1])
    code = int(sys.argv[2])
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job_id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ["SLURM_JOB_ID"]
    step = read_json(folder / "steps.json")[int(task or 0)]
    return 0 if wanted(Path(step["run_dir"]), step["stage"], job_id, code, folder) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Ask Slurm what became of jobs: squeue for those it has, sacct for those that ended, scontrol for what both do not know."""

from __future__ import annotations

import re
import shutil
import subprocess

FINAL = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
)


def array_of(job_id: str) -> str:
    """'12' of the array's task '12_3', and of the job '12' itself."""
    return re.sub(r"_\d+$", "", job_id)


def ask(*command: str) -> str | None:
    """What a command of Slurm prints; None where it fails, is missing or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def job_states(ids: list[str]) -> dict[str, str]:
    """{job id: state} of those of `ids` that Slurm still knows; array tasks as 12_3."""
    queued = _table(ask("squeue", "-h", "-r", "--me", "-o", "%i|%T"))
    past = _table(
        ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(ids))
        if shutil.which("sacct")
        else None
    )
    found = {}
    for job in ids:
        state = queued.get(job) or past.get(job)
        if job not in queued and state not in FINAL:  # sacct lags a few seconds behind the controller
            state = state_of(job) or state
        if state:
            found[job] = state
    return found


def _table(rows: str | None) -> dict[str, str]:
    pairs = [row.partition("|")[::2] for row in (rows or "").splitlines()]
    return {job: state.split()[0] for job, state in pairs if state}  # "CANCELLED by 1000"


def state_of(job_id: str) -> str | None:
    """State of one job from the controller, which forgets a job some minutes after its end; None where it does not know it."""
    text = ask("scontrol", "show", "job", "-o", job_id) or ""
    state = re.search(r"\bJobState=(\w+)", text)
    return state.group(1) if state else None

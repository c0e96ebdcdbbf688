"""Ask Slurm what became of jobs: squeue for those it has, sacct for those that ended, scontrol where there is no sacct."""

from __future__ import annotations

import re
import shutil
import subprocess

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED")


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
    wanted, found = set(ids), dict[str, str]()
    rows = ask("squeue", "-h", "-r", "--me", "-o", "%i|%T") or ""
    rows += (ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(ids)) or "") if shutil.which("sacct") else ""
    for row in rows.splitlines():
        job, _, state = row.partition("|")
        if job in wanted and state:
            found.setdefault(job, state.split()[0])  # squeue first: sacct lags a few seconds behind
    for job in wanted - found.keys():
        if last := state_of(job):
            found[job] = last
    return found


def state_of(job_id: str) -> str | None:
    """State of one job from the controller, which forgets a job some minutes after its end; None where it does not know it."""
    text = ask("scontrol", "show", "job", "-o", job_id) or ""
    state = re.search(r"\bJobState=(\w+)", text)
    return state.group(1) if state else None

"""Ask Slurm about jobs and partitions: squeue for queued jobs, sacct for ended ones, scontrol and sinfo."""

from __future__ import annotations

import math
import re
import shutil
import subprocess

from pipeline.config.suggest import suggest

ANSWER_LIMIT_S = 20
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


def ask(*command: str) -> str | None:
    """Return what a Slurm command prints, or None if it fails, is missing or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWER_LIMIT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


# ---- jobs


def array_of(job_id: str) -> str:
    """Return '12' for the array task '12_3', and '12' for the job '12'."""
    return re.sub(r"_\d+$", "", job_id)


def job_states(ids: list[str]) -> dict[str, str]:
    """Return {job id: state} of the jobs that Slurm still knows; array tasks have ids like 12_3."""
    queued = _table(ask("squeue", "-h", "-r", "--me", "-o", "%i|%T"))
    past: dict[str, str] = {}
    if shutil.which("sacct"):
        past = _table(ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(ids)))
    found = {}
    for job in ids:
        state = queued.get(job) or past.get(job)
        if job not in queued and state not in FINAL:  # sacct lags a few seconds behind the controller
            state = state_of(job) or state
        if state:
            found[job] = state
    return found


def _table(rows: str | None) -> dict[str, str]:
    """Parse lines of 'job|state'; a state may have a suffix, as in 'CANCELLED by 1000'."""
    found = {}
    for row in (rows or "").splitlines():
        job, _, state = row.partition("|")
        if state:
            found[job] = state.split()[0]
    return found


def state_of(job_id: str) -> str | None:
    """Return the controller's state of one job. It forgets a job some minutes after the job's end."""
    text = ask("scontrol", "show", "job", "-o", job_id) or ""
    state = re.search(r"\bJobState=(\w+)", text)
    return state.group(1) if state else None


# ---- partitions


def unknown_partition(names: str) -> str:
    """Return what is wrong with 'gpu,long' as a list of partitions, or ""."""
    there = (ask("sinfo", "-h", "-o", "%R") or "").split()
    if not there or set(names.split(",")) <= set(there):
        return ""
    return f"no partition {names!r} on this cluster, there are {', '.join(there)}{suggest(names, there)}"


def time_limit_min(partition: str | None) -> float:
    """Return the longest time limit of a partition in minutes; infinity if Slurm does not say."""
    limits = [_minutes(text) for text in (ask("sinfo", "-h", *_of(partition), "-o", "%l") or "").split()]
    return max(limits, default=math.inf)


def _minutes(text: str) -> float:
    """Parse a time limit: '7-00:00:00', '1:30:00', '30:00', or 'infinite'."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+)*", clock):
        return math.inf
    padded = [0, 0, *map(int, clock.split(":"))]
    hours, minutes, seconds = padded[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def nodes_of(partition: str | None) -> str:
    """Describe the nodes of a partition in words."""
    rows = ask("sinfo", "-h", *_of(partition), "-o", "%D nodes of %c CPUs, %m MB, %G, features %f, limit %l")
    lines = (rows or "unknown nodes").strip().splitlines()
    return " | ".join(lines[:4])


def _of(partition: str | None) -> list[str]:
    return ["-p", partition] if partition else []

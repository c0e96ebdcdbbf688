"""jobs.json and error.json of a run directory: what was submitted, where it ran, how it ended."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.runtime.files import write_json
from pipeline.runtime.record import read_json

# How an error looks on a rank whose peer died first: the least telling of a job's errors.
PEER_LOST = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "Timed out waiting", "Connection refused")


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    with open(run_dir / ".lock", "a") as lock:
        with suppress(OSError):  # a file system without locks: the writers are few and seldom meet
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _entry(run_dir: Path, stage: str, job_id: str) -> Iterator[dict[str, Any]]:
    """The job's entry in jobs.json, written back at the end; several jobs of a run may write at once."""
    with _locked(run_dir):
        jobs = read_json(run_dir / "jobs.json", [])
        found = [job for job in jobs if (job["stage"], job["id"]) == (stage, job_id)]
        entry = found[-1] if found else {"stage": stage, "id": job_id, "state": "SUBMITTED", "attempts": []}
        if not found:  # the job itself may be here before its launcher
            jobs.append(entry)
        yield entry
        write_json(run_dir / "jobs.json", jobs)


def submitted(run_dir: Path, stage: str, job_id: str, executor: str, after: list[str], logs: Path) -> None:
    """Note a job that was handed to the executor, after the jobs `after`."""
    with _entry(run_dir, stage, job_id) as entry:
        entry |= {"executor": executor, "submitted": time.time(), "after": after, "logs": str(logs)}


def started(run_dir: Path, stage: str, job_id: str, hosts: list[str]) -> None:
    """Note an attempt: the first start, or one after a requeue (rank 0)."""
    with _entry(run_dir, stage, job_id) as entry:
        if entry["attempts"]:  # not on the first start: the launcher did, and a quick peer may have failed by now
            forget_failure(run_dir, stage)
        entry["state"] = "RUNNING"
        entry["attempts"].append({"hosts": hosts, "started": time.time(), "ended": None, "state": "RUNNING"})


def ended(run_dir: Path, stage: str, job_id: str, state: str) -> None:
    """Note how the last attempt ended: COMPLETED, FAILED, CANCELLED (asked to stop) or REQUEUED (rank 0 or launcher)."""
    with _entry(run_dir, stage, job_id) as entry:
        entry["state"] = state
        for attempt in entry["attempts"][-1:]:
            attempt |= {"state": state, "ended": time.time()}


def state(run_dir: Path, stage: str, job_id: str) -> str:
    """State of the newest entry of this job, as last noted."""
    jobs = [job for job in read_json(run_dir / "jobs.json", []) if (job["stage"], job["id"]) == (stage, job_id)]
    return jobs[-1]["state"] if jobs else "UNKNOWN"


def _error_file(run_dir: Path, stage: str) -> Path:
    return run_dir / "logs" / stage / "error.json"


def forget_failure(run_dir: Path, stage: str) -> None:
    """Remove the error of an earlier job or attempt."""
    _error_file(run_dir, stage).unlink(missing_ok=True)


def failure(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """The error that tells most: {"kind", "message", "user", "rank", "weight"}."""
    found: dict[str, Any] | None = read_json(_error_file(run_dir, stage))
    return found


def failed_for_s(run_dir: Path, stage: str) -> float:
    """Seconds since a rank failed; 0 where none has."""
    with suppress(FileNotFoundError):
        return time.time() - _error_file(run_dir, stage).stat().st_mtime
    return 0.0


def note_failure(run_dir: Path, stage: str, rank: int, error: Exception) -> None:
    """Keep the most telling error of all ranks: a user's mistake, else the first that is not a lost peer."""
    message = str(error).strip() or type(error).__name__
    user = isinstance(error, UserError)
    weight = 2 if user else 0 if any(text in message for text in PEER_LOST) else 1
    with _locked(run_dir):
        there = failure(run_dir, stage)
        if there is None or weight > there["weight"]:
            content = {"kind": type(error).__name__, "message": message, "user": user, "rank": rank, "weight": weight}
            write_json(_error_file(run_dir, stage), content)

"""jobs.json and error.json of a run directory: what was submitted, where it ran, how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.rundir.files import write_json
from pipeline.rundir.lock import locked
from pipeline.rundir.record import read_json
from slurm.queue import FINAL, job_states

LOCK = ".lock"  # of jobs.json and error.json, in the run directory

# How an error looks on a rank whose peer died first: the least telling of a job's errors.
PEER_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "Connection refused",
)


@contextmanager
def _entry(run_dir: Path, stage: str, job_id: str) -> Iterator[dict[str, Any]]:
    """The job's entry in jobs.json, written back at the end; several jobs of a run may write at once."""
    with locked(run_dir / LOCK):
        jobs = read_json(run_dir / "jobs.json", [])
        found = [job for job in jobs if (job["stage"], job["id"]) == (stage, job_id)]
        entry = found[-1] if found else {"stage": stage, "id": job_id, "state": "SUBMITTED", "attempts": []}
        if not found:  # the job itself may be here before its launcher
            jobs.append(entry)
        yield entry
        write_json(run_dir / "jobs.json", jobs)


def submitted(
    run_dir: Path,
    stage: str,
    job_id: str,
    executor: str,
    after: str | None,
    logs: Path,
    part: tuple[int, int] | None = None,
) -> None:
    """Note a job that was handed to the executor; `after`: its dependencies as sbatch got them; `part`: (k, n) of the stage."""
    with _entry(run_dir, stage, job_id) as entry:
        entry |= {"executor": executor, "submitted": time.time(), "after": after or "", "logs": str(logs)} | (
            {"part": part} if part else {}
        )


def started(run_dir: Path, stage: str, job_id: str, hosts: list[str]) -> None:
    """Note an attempt: the first start, or one after a requeue (rank 0)."""
    with _entry(run_dir, stage, job_id) as entry:
        if entry[
            "attempts"
        ]:  # not on the first start: the launcher did, and a quick peer may have failed by now
            forget_failure(run_dir, stage)
        entry["state"] = "RUNNING"
        entry["attempts"].append({"hosts": hosts, "started": time.time(), "ended": None, "state": "RUNNING"})


def ended(run_dir: Path, stage: str, job_id: str, state: str) -> None:
    """Note how the last attempt ended: COMPLETED, FAILED, CANCELLED (asked to stop) or REQUEUED (rank 0 or launcher)."""
    with _entry(run_dir, stage, job_id) as entry:
        entry["state"] = state
        for attempt in entry["attempts"][-1:]:
            attempt |= {"state": state, "ended": time.time()}


def crashed(run_dir: Path, stage: str, job_id: str, progress: int, code: int) -> list[int]:
    """Note a crash at `progress` (see Stage.progress); returns the progress at every crash of this job so far (batch script)."""
    with _entry(run_dir, stage, job_id) as entry:
        crashes = entry.setdefault("crashes", [])
        crashes.append({"time": time.time(), "progress": progress, "code": code})
        entry["state"] = "CRASHED"
        for attempt in entry["attempts"][-1:]:  # rank 0 may have been killed and could not say so
            attempt |= {"state": "CRASHED", "ended": attempt["ended"] or time.time()}
        return [crash["progress"] for crash in crashes]


def state(run_dir: Path, stage: str, job_id: str) -> str:
    """State of the newest entry of this job, as last noted."""
    jobs = [
        job for job in read_json(run_dir / "jobs.json", []) if (job["stage"], job["id"]) == (stage, job_id)
    ]
    return jobs[-1]["state"] if jobs else "UNKNOWN"


def unfinished(run_dir: Path) -> list[dict[str, Any]]:
    """Entries of jobs on Slurm that have not ended, as far as Slurm tells."""
    refresh(run_dir)
    return [
        job
        for job in read_json(run_dir / "jobs.json", [])
        if job.get("executor") == "slurm" and job["state"] not in FINAL
    ]


def refresh(run_dir: Path) -> None:
    """Put what Slurm says into jobs.json where a job has ended without being able to say so itself."""
    with locked(run_dir / LOCK):
        jobs = read_json(run_dir / "jobs.json", [])
        unsure = [job for job in jobs if job.get("executor") == "slurm" and job["state"] not in FINAL]
        states = job_states([job["id"] for job in unsure]) if unsure else {}
        for job in unsure:
            now = states.get(job["id"], job["state"])
            if now in FINAL:
                job["state"] = now
                for attempt in job["attempts"][-1:]:
                    attempt |= {"state": now, "ended": attempt["ended"] or time.time()}
        if unsure:
            write_json(run_dir / "jobs.json", jobs)


def _error_file(run_dir: Path, stage: str) -> Path:
    return run_dir / "logs" / stage / "error.json"


def _stall_file(run_dir: Path, stage: str) -> Path:
    return (
        run_dir / stage / "stall.json"
    )  # written by the watchdog, whose process cannot come back to say more


def forget_failure(run_dir: Path, stage: str) -> None:
    """Remove the error of an earlier job or attempt."""
    for file in (_error_file(run_dir, stage), _stall_file(run_dir, stage)):
        file.unlink(missing_ok=True)


def failure(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """The error that tells most: {"kind", "message", "user", "rank", "weight"}."""
    found: dict[str, Any] | None = read_json(_error_file(run_dir, stage))
    if found is None and (stall := read_json(_stall_file(run_dir, stage))):
        return {
            "kind": "Stalled",
            "message": stall["message"],
            "user": False,
            "rank": stall["ranks"][0],
            "weight": 1,
        }
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
    with locked(run_dir / LOCK):
        there = failure(run_dir, stage)
        if there is None or weight > there["weight"]:
            content = {
                "kind": type(error).__name__,
                "message": message,
                "user": user,
                "rank": rank,
                "weight": weight,
            }
            write_json(_error_file(run_dir, stage), content)


def note_end_of_restarts(run_dir: Path, stage: str, job_id: str, reason: str) -> None:
    """Keep why a job that crashed is not restarted, with the error that it crashed with."""
    with locked(run_dir / LOCK):
        there = failure(run_dir, stage) or {
            "kind": "Killed",
            "message": "a rank ended without a word (killed? out of memory?)",
            "rank": 0,
        }
        write_json(
            _error_file(run_dir, stage),
            {**there, "message": f"{reason}: {there['message']}", "user": False, "weight": 3},
        )
    ended(run_dir, stage, job_id, "FAILED")

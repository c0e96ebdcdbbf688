"""jobs.json and error.json of a run directory: what was submitted, where it ran, how it ended."""

from __future__ import annotations

import copy
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.rundir.files import write_json
from pipeline.rundir.lock import locked
from pipeline.rundir.record import read_json
from pipeline.runtime.owner import start_ticks

LOCK = ".lock"  # of jobs.json and error.json, in the run directory

# These texts mark an error on a rank whose peer died first. It says the least about the cause.
PEER_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "Connection refused",
)
SILENT = "a rank ended without an error message (killed? out of memory?)"
ATTEMPT_MARK = "### attempt"  # the batch script writes it to the log when an attempt begins
EXCEPTION = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception|Interrupt)\b.*")
SYSTEM_ERROR = re.compile(r"(srun|slurmstepd|bash|/\S+|\S*python\S*): .+")
NOISE = re.compile(r"Exited with exit code|Job step aborted|Terminating StepId|STEP \S+ ON|JOB \S+ ON")


# ---- jobs.json


@contextmanager
def all_jobs(run_dir: Path) -> Iterator[list[dict[str, Any]]]:
    """Hold the entries of jobs.json; changes are written back. Several jobs of a run may write at once."""
    with locked(run_dir / LOCK):
        jobs = read_json(run_dir / "jobs.json", [])
        before = copy.deepcopy(jobs)
        yield jobs
        if jobs != before:
            write_json(run_dir / "jobs.json", jobs)


@contextmanager
def _entry(run_dir: Path, stage: str, job_id: str, logs: str = "") -> Iterator[dict[str, Any]]:
    """Hold one job's entry. It is created if the job starts before its launcher has recorded it.

    `logs`: of the submission, if it is known. Process ids repeat, but no two submissions share a folder.
    """
    with all_jobs(run_dir) as jobs:
        found = [job for job in jobs if (job["stage"], job["id"]) == (stage, job_id)]
        if logs:
            found = [job for job in found if job.get("logs", logs) == logs]
        if not found:
            found.append({"stage": stage, "id": job_id, "state": "SUBMITTED", "attempts": []})
            jobs += found
        yield found[-1]


@dataclass(frozen=True)
class Submission:
    """A job as the launcher hands it over."""

    executor: str
    logs: str  # folder of the submission
    after: str = ""  # dependencies, as sbatch got them
    part: tuple[int, int] | None = None  # (k, n) of the stage
    process: dict[str, Any] | None = None  # for a job of one host, see `process`


def process(pid: int) -> dict[str, Any]:
    """Describe a process of this host. The start time distinguishes it from a later one with its pid."""
    return {"host": socket.gethostname(), "pid": pid, "started": start_ticks(pid)}


def alive(described: dict[str, Any]) -> bool | None:
    """Whether a described process is running; None if it belongs to another host."""
    if described["host"] != socket.gethostname():
        return None
    return described["started"] is not None and start_ticks(described["pid"]) == described["started"]


def submitted(run_dir: Path, stage: str, job_id: str, submission: Submission) -> None:
    """Record a job that was handed to an executor (launcher)."""
    with _entry(run_dir, stage, job_id, submission.logs) as entry:
        entry["executor"] = submission.executor
        entry["submitted"] = time.time()
        entry["after"] = submission.after
        entry["logs"] = submission.logs
        if submission.part:
            entry["part"] = list(submission.part)
        if submission.process:
            entry["process"] = submission.process


def started(run_dir: Path, stage: str, job_id: str, hosts: list[str]) -> None:
    """Record an attempt: the first start, or one after a requeue (rank 0)."""
    with _entry(run_dir, stage, job_id) as entry:
        if entry["attempts"] or entry.get("crashes"):  # not at the first start: a quick peer may have failed
            forget_failure(run_dir, stage)
        entry["state"] = "RUNNING"
        attempt = {"hosts": hosts, "started": time.time(), "ended": None, "state": "RUNNING"}
        entry["attempts"].append(attempt)


def ended(run_dir: Path, stage: str, job_id: str, state: str) -> None:
    """Record how the last attempt ended (rank 0 or the launcher).

    `state`: COMPLETED, FAILED, CANCELLED (asked to stop) or REQUEUED.
    """
    with _entry(run_dir, stage, job_id) as entry:
        entry["state"] = state
        for attempt in entry["attempts"][-1:]:
            attempt |= {"state": state, "ended": time.time()}


def logs_of(run_dir: Path, job: dict[str, Any]) -> Path:
    """Return the folder with the logs of a recorded job, also after the runs have moved."""
    folder = Path(job["logs"])
    if folder.is_dir():
        return folder
    return run_dir.parent.joinpath(*folder.parts[-5:])  # RUN/logs/STAGE/submitit/NUMBER


def settle(entry: dict[str, Any], state: str) -> None:
    """Record the final state of a job that could not record it itself."""
    entry["state"] = state
    for attempt in entry["attempts"][-1:]:
        attempt |= {"state": state, "ended": attempt["ended"] or time.time()}


def crashed(run_dir: Path, stage: str, job_id: str, progress: int, code: int) -> list[int]:
    """Record a crash at `progress` (see Stage.progress) with exit code `code` (batch script).

    Returns the progress at every crash of this job so far.
    """
    with _entry(run_dir, stage, job_id) as entry:
        crashes = entry.setdefault("crashes", [])
        crashes.append({"time": time.time(), "progress": progress, "code": code})
        settle(entry, "CRASHED")
        return [crash["progress"] for crash in crashes]


def state(run_dir: Path, stage: str, job_id: str) -> str:
    """Return the last recorded state of a job, or UNKNOWN."""
    jobs = read_json(run_dir / "jobs.json", [])
    found = [job["state"] for job in jobs if (job["stage"], job["id"]) == (stage, job_id)]
    return found[-1] if found else "UNKNOWN"


# ---- error.json


def _error_file(run_dir: Path, stage: str) -> Path:
    return run_dir / "logs" / stage / "error.json"


def _stall_file(run_dir: Path, stage: str) -> Path:
    return run_dir / stage / "stall.json"  # the watchdog writes it just before it ends its process


def forget_failure(run_dir: Path, stage: str) -> None:
    """Remove the error of an earlier job or attempt."""
    _error_file(run_dir, stage).unlink(missing_ok=True)
    _stall_file(run_dir, stage).unlink(missing_ok=True)


def failure(run_dir: Path, stage: str, job_id: str = "") -> dict[str, Any] | None:
    """Return the most informative error: {"kind", "message", "user", "rank", "weight", "job"}.

    With `job_id`, an error of another job does not count: a second launch of a run that is being trained
    is refused, and the first one goes on.
    """
    found: dict[str, Any] | None = read_json(_error_file(run_dir, stage))
    if found and job_id and found.get("job") not in ("", None, job_id):
        found = None
    if found:
        return found
    stall = read_json(_stall_file(run_dir, stage))
    if stall:
        return _error("Stalled", stall["message"], rank=stall["ranks"][0], weight=1)
    return None


def failed_for_s(run_dir: Path, stage: str, job_id: str) -> float:
    """Seconds since a rank of this job failed; 0 if none has."""
    if failure(run_dir, stage, job_id) is None:
        return 0.0
    with suppress(FileNotFoundError):
        return time.time() - _error_file(run_dir, stage).stat().st_mtime
    return 0.0


def note_failure(run_dir: Path, stage: str, rank: int, error: Exception, job_id: str = "") -> None:
    """Keep the most informative error: a user's mistake, else the first that is not a lost peer."""
    message = str(error).strip() or type(error).__name__
    user = isinstance(error, UserError)
    weight = 1
    if user:
        weight = 2
    elif any(text in message for text in PEER_LOST):
        weight = 0
    with locked(run_dir / LOCK):
        there = failure(run_dir, stage, job_id)
        if there is None or weight > there["weight"]:
            found = _error(type(error).__name__, message, rank, weight, user, job_id)
            write_json(_error_file(run_dir, stage), found)


def note_silent_end(run_dir: Path, stage: str, logs: Path, job_id: str) -> None:
    """Keep what the log says if the job ended before any rank could record an error."""
    with locked(run_dir / LOCK):
        if failure(run_dir, stage, job_id) is None:
            found = _error("Killed", last_words(logs, job_id) or SILENT, job=job_id)
            write_json(_error_file(run_dir, stage), found)


def note_end_of_restarts(run_dir: Path, stage: str, job_id: str, reason: str) -> None:
    """Put before the error why a job that crashed is not restarted."""
    with locked(run_dir / LOCK):
        there = failure(run_dir, stage, job_id) or _error("Killed", SILENT, job=job_id)
        message = f"{reason}: {there['message']}"
        write_json(_error_file(run_dir, stage), {**there, "message": message, "user": False, "weight": 3})
    ended(run_dir, stage, job_id, "FAILED")


def _error(
    kind: str, message: str, rank: int = 0, weight: int = 0, user: bool = False, job: str = ""
) -> dict[str, Any]:
    return {"kind": kind, "message": message, "user": user, "rank": rank, "weight": weight, "job": job}


def last_words(logs: Path, job_id: str) -> str:
    """Return the error that the last attempt of a job printed, or "".

    A job that fails before its stage begins (module not found, python not found) leaves no other trace. srun
    may end rank 0 before it can say why; then the first other rank with an exception does. Their logs do not
    tell attempts apart, so they count in the first attempt only.
    """
    files = sorted(logs.glob(f"{job_id}_*_log.err"), key=lambda log: (len(log.name), log.name))
    texts = [[line.strip() for line in log.read_text(errors="replace").splitlines()] for log in files]
    if not texts:
        return ""
    marks = [i for i, line in enumerate(texts[0]) if line.startswith(ATTEMPT_MARK)]
    if marks:
        texts[0] = texts[0][marks[-1] :]
    if len(marks) > 1:
        texts = texts[:1]
    for pattern in (EXCEPTION, SYSTEM_ERROR):
        for lines in texts:
            for line in reversed(lines):
                if pattern.fullmatch(line) and not NOISE.search(line):
                    return line
    return ""

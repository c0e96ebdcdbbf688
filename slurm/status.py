"""Show where the jobs of runs stand, follow them, and find their logs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.errors import StorageError
from pipeline.reporting.text import duration, text_table
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import OPEN_STATES, read_json, require_run, run_config
from pipeline.runtime.logs import LINE, PROGRESS
from pipeline.runtime.split import ceil_div
from slurm import ledger
from slurm.executors import EXECUTORS, executor_named
from slurm.queue import FINAL

FOLLOW_EVERY_S = 3.0
SAY_PROGRESS_EVERY_S = 30.0
TAIL_LINES = 25
HEAD = ["run", "stage", "job", "state", "attempt", "progress"]


# ---- states


def refresh(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of jobs.json, updated for jobs that ended without recording it themselves.

    The file is updated too, unless this user may only read the run or the disk is full.
    """
    try:
        with ledger.all_jobs(run_dir) as jobs:
            _settle_ended(jobs)
    except StorageError:
        jobs = read_json(run_dir / "jobs.json", [])
        _settle_ended(jobs)
    return jobs


def _settle_ended(jobs: list[dict[str, Any]]) -> None:
    for name in EXECUTORS:
        unsure = [job for job in jobs if _open(job) and job.get("executor") == name]
        states = executor_named(name).states(unsure) if unsure else []
        for job, state in zip(unsure, states, strict=True):
            if state in FINAL:
                ledger.settle(job, state)


def unfinished(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of jobs that have not ended, as far as their executors know."""
    jobs = refresh(run_dir)
    return [job for job in jobs if _open(job) and job.get("executor") in EXECUTORS]


def states_in_words(jobs: list[dict[str, Any]]) -> str:
    """Say in a few words what a run does: "train RUNNING", "eval FAILED", "complete", or "not started"."""
    newest = {job["stage"]: job["state"] for job in jobs}  # of each stage
    for wanted in (("RUNNING",), OPEN_STATES, ("FAILED", "CANCELLED")):
        for stage, state in newest.items():
            if state in wanted:
                return f"{stage} {state}"
    bad = [f"{stage} {state}" for stage, state in newest.items() if state != "COMPLETED"]
    if bad:
        return bad[-1]
    return f"{list(newest)[-1]} complete" if newest else "not started"


def _open(job: dict[str, Any]) -> bool:
    return job["state"] not in FINAL


# ---- the table


@dataclass(frozen=True)
class StageStatus:
    """The newest submission of one stage of one run; the tasks of an array together."""

    run: str
    stage: str
    jobs: list[str]
    state: str
    attempt: int
    progress: str  # step, rate and time left, if the stage reports them
    error: str

    @property
    def ended(self) -> bool:
        """Whether the stage has reached a final state."""
        return self.state in FINAL


def survey(run_dirs: list[Path]) -> list[StageStatus]:
    """Return the status of every stage of every run that was ever submitted.

    Raises ConfigError for a folder that is no run directory.
    """
    found = []
    for run_dir in run_dirs:
        config = run_config(run_dir)
        submissions: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for job in refresh(run_dir):
            submissions.setdefault((job["stage"], "part" in job), []).append(job)
        for (stage, _), jobs in submissions.items():
            newest = [job for job in jobs if job.get("logs") == jobs[-1].get("logs")]
            found.append(_stage_status(run_dir, config, stage, newest))
    return found


def _stage_status(run_dir: Path, config: RunConfig, stage: str, jobs: list[dict[str, Any]]) -> StageStatus:
    state = _common_state([job["state"] for job in jobs])
    return StageStatus(
        run=run_dir.name,
        stage=f"{stage} parts" if "part" in jobs[0] else stage,
        jobs=[job["id"] for job in jobs],
        state=state,
        attempt=max(len(job["attempts"]) for job in jobs),
        progress=(
            _progress(run_dir, config, state) if stage == "train" else _logged_progress(run_dir, stage, state)
        ),
        error="" if state == "COMPLETED" else _error(run_dir, stage, jobs[-1]),
    )


def _common_state(states: list[str]) -> str:
    """Return the state of an array: of a job that has not ended, else of one that failed."""
    running = [state for state in states if state not in FINAL]
    if not running:
        bad = [state for state in states if state != "COMPLETED"]
        return bad[0] if bad else "COMPLETED"
    if len(states) == 1:
        return running[0]
    return f"{running[0]} ({states.count('COMPLETED')} of {len(states)} done)"


def _error(run_dir: Path, stage: str, job: dict[str, Any]) -> str:
    error = ledger.failure(run_dir, stage)
    if error:
        return str(error["message"].splitlines()[0][:160])
    if job["state"] == "FAILED" and "logs" in job:
        return ledger.last_words(ledger.logs_of(run_dir, job), job["id"])[:160]
    return ""


def _logged_progress(run_dir: Path, stage: str, state: str) -> str:
    """Return what the log of a running stage says last about its progress, or ""."""
    if state != "RUNNING":
        return ""
    for line in reversed(tail(run_dir / "logs" / stage / "rank0.log").splitlines()):
        found = LINE.fullmatch(line)
        if found and PROGRESS.fullmatch(found["text"]):
            return found["text"]
    return ""


def _progress(run_dir: Path, config: RunConfig, state: str) -> str:
    train = config.train
    last = ceil_div(train.images, train.batch_size)
    if state == "COMPLETED":  # the last record may be of an earlier step
        return f"{last}/{last}"
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    timed = [record for record in records if "train/images_per_s" in record["values"]]
    if not timed:
        return f"0/{last}"
    step = timed[-1]["step"]
    rate = timed[-1]["values"]["train/images_per_s"]
    if step >= last:
        return f"{step}/{last}"
    left = (last - step) * train.batch_size / rate if rate else float("inf")
    return f"{step}/{last}, {rate:.0f} images/s, {duration(left)} left"


def as_table(statuses: list[StageStatus]) -> str:
    """Return one line for each stage, then the errors."""
    rows = []
    for status in statuses:
        more = "…" if len(status.jobs) > 1 else ""
        first = f"{status.jobs[0]}{more}"
        rows.append([status.run, status.stage, first, status.state, str(status.attempt), status.progress])
    table = text_table(HEAD, rows, 160) or "nothing was submitted yet"
    errors = [f"{status.run}, {status.stage}: {status.error}" for status in statuses if status.error]
    return "\n".join([table, *errors])


def follow(run_dirs: list[Path]) -> Iterator[str]:
    """Yield a line when a stage changes its state, and at times its progress, until all stages have ended."""
    seen: dict[tuple[str, str], tuple[str, int]] = {}
    said = time.monotonic()
    while True:
        statuses = survey(run_dirs)
        now = time.strftime("%H:%M:%S")
        for status in statuses:
            key = (status.run, status.stage)
            if seen.get(key) != (status.state, status.attempt):
                seen[key] = (status.state, status.attempt)
                again = f", attempt {status.attempt}" if status.attempt > 1 else ""
                yield f"{now} {status.run} {status.stage}: {status.state}{again}"
        if all(status.ended for status in statuses):
            return
        if time.monotonic() - said >= SAY_PROGRESS_EVERY_S:
            said = time.monotonic()
            for status in statuses:
                if status.state == "RUNNING" and status.progress:
                    yield f"{now} {status.run} {status.stage}: {status.progress}"
        time.sleep(FOLLOW_EVERY_S)


# ---- logs


def log_of(run_dir: Path, stage: str | None, rank: int | None) -> Path:
    """Return the log to read: of the stage that runs or failed last, of the rank with the error, else rank 0.

    The file may not exist yet. Raises ConfigError if `run_dir` is no run directory.
    """
    require_run(run_dir)
    # A rank may crash before rank 0 has recorded the attempt; a recorded crash means that there are logs.
    jobs = [job for job in read_json(run_dir / "jobs.json", []) if job["attempts"] or job.get("crashes")]
    if stage is None:
        stage = _stage_to_read(jobs)
    error = ledger.failure(run_dir, stage)
    if rank is None:
        rank = error["rank"] if error else 0
    submitted = [job for job in jobs if job["stage"] == stage]
    if error and submitted:  # a traceback is in what the process printed
        return ledger.logs_of(run_dir, submitted[-1]) / f"{submitted[-1]['id']}_{rank}_log.err"
    return run_dir / "logs" / stage / f"rank{rank}.log"


def _stage_to_read(jobs: list[dict[str, Any]]) -> str:
    """Return the stage that runs, else the last that failed, else the last that ran."""
    started = [job for job in jobs if job["stage"] != "finish"]
    running = [job for job in started if job["state"] == "RUNNING"]
    bad = [job for job in started if job["state"] not in ("COMPLETED", "RUNNING")]
    chosen = running or bad or started
    return str(chosen[-1]["stage"]) if chosen else "shard"


def tail(file: Path) -> str:
    """Return the last lines of a log."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return "\n".join(lines[-TAIL_LINES:]) or "(the log is empty)"


class LogTail:
    """Prints what is added to a file from now on."""

    def __init__(self, file: Path) -> None:
        """Start at the present end of `file`, which need not exist yet."""
        self._file = file
        self._position = file.stat().st_size if file.exists() else 0

    def new(self) -> str:
        """Return what was added since the last call."""
        if not self._file.exists():
            return ""
        with open(self._file, "rb") as opened:
            opened.seek(self._position)
            added = opened.read()
        self._position += len(added)
        return added.decode(errors="replace")

    def show(self) -> None:
        """Print what is new."""
        added = self.new()
        if added:
            print(added, end="", flush=True)

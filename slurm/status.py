"""Where the jobs of runs stand, from the files of the run directories and from Slurm; following them until they end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.reporting.text import duration, text_table
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import read_json, run_config
from pipeline.runtime.split import ceil_div
from slurm import ledger
from slurm.queue import FINAL

FOLLOW_EVERY_S = 3.0
SAY_PROGRESS_EVERY_S = 30.0


@dataclass(frozen=True)
class StageStatus:
    """The newest submission of one stage of one run; an array's tasks together."""

    run: str
    stage: str
    jobs: list[str]
    state: str
    attempt: int
    progress: str  # step, rate and time left where the stage tells
    error: str

    @property
    def ended(self) -> bool:
        """Nothing more will come of it."""
        return self.state in FINAL


def survey(run_dirs: list[Path]) -> list[StageStatus]:
    """Every stage of every run that was ever submitted, states refreshed from Slurm. Raises ConfigError for no run directory."""
    found = []
    for run_dir in run_dirs:
        config = run_config(run_dir)
        ledger.refresh(run_dir)
        jobs = read_json(run_dir / "jobs.json", [])
        for stage, part in dict.fromkeys((job["stage"], "part" in job) for job in jobs):
            own = [job for job in jobs if (job["stage"], "part" in job) == (stage, part)]
            newest = [job for job in own if job.get("logs") == own[-1].get("logs")]
            found.append(_stage_status(run_dir, config, stage, newest))
    return found


def _stage_status(run_dir: Path, config: RunConfig, stage: str, jobs: list[dict[str, Any]]) -> StageStatus:
    states = [job["state"] for job in jobs]
    state = next((s for s in states if s not in FINAL), None) or next(
        (s for s in states if s != "COMPLETED"), "COMPLETED"
    )
    if len(jobs) > 1 and state not in FINAL:
        state += f" ({states.count('COMPLETED')} of {len(jobs)} done)"
    error = ledger.failure(run_dir, stage)
    text = error["message"].splitlines()[0][:160] if error and state != "COMPLETED" else ""
    attempt = max(len(job["attempts"]) for job in jobs)
    progress = _progress(run_dir, config) if stage == "train" else ""
    name = f"{stage} parts" if "part" in jobs[0] else stage
    return StageStatus(run_dir.name, name, [job["id"] for job in jobs], state, attempt, progress, text)


def _progress(run_dir: Path, config: RunConfig) -> str:
    train = config.train
    last = ceil_div(train.images, train.batch_size)
    records = [
        r
        for r in read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
        if "train/images_per_s" in r["values"]
    ]
    if not records:
        return f"0/{last}"
    step, rate = records[-1]["step"], records[-1]["values"]["train/images_per_s"]
    left = (last - step) * train.batch_size / rate if rate else float("inf")
    return f"{step}/{last}" + (f", {rate:.0f} images/s, {duration(left)} left" if step < last else "")


def as_table(statuses: list[StageStatus]) -> str:
    """One line for each stage, then the errors."""
    rows = [
        [
            s.run,
            s.stage,
            ",".join(s.jobs[:1]) + ("…" if len(s.jobs) > 1 else ""),
            s.state,
            str(s.attempt),
            s.progress,
        ]
        for s in statuses
    ]
    errors = [f"{s.run}, {s.stage}: {s.error}" for s in statuses if s.error]
    return "\n".join(
        [
            text_table(["run", "stage", "job", "state", "attempt", "progress"], rows, 160)
            or "nothing was submitted yet",
            *errors,
        ]
    )


def follow(run_dirs: list[Path]) -> Iterator[str]:
    """A line whenever a stage changes its state, and now and then on progress, until all have ended."""
    seen: dict[tuple[str, str], tuple[str, int]] = {}
    said = time.monotonic()
    while True:
        statuses = survey(run_dirs)
        for s in statuses:
            if seen.get((s.run, s.stage)) != (s.state, s.attempt):
                seen[s.run, s.stage] = (s.state, s.attempt)
                yield f"{time.strftime('%H:%M:%S')} {s.run} {s.stage}: {s.state}" + (
                    f", attempt {s.attempt}" if s.attempt > 1 else ""
                )
        if all(s.ended for s in statuses):
            return
        if time.monotonic() - said >= SAY_PROGRESS_EVERY_S:
            said = time.monotonic()
            yield from (
                f"{time.strftime('%H:%M:%S')} {s.run} {s.stage}: {s.progress}"
                for s in statuses
                if s.state == "RUNNING" and s.progress
            )
        time.sleep(FOLLOW_EVERY_S)


def log_of(run_dir: Path, stage: str | None, rank: int | None) -> Path:
    """The log worth reading: of the stage that runs or failed last, of the rank that has the error, else of rank 0.

    Raises ConfigError where nothing was submitted. The file may not be there yet.
    """
    # A rank may crash before rank 0 has noted the attempt: the crash itself tells that there are logs.
    jobs = [job for job in read_json(run_dir / "jobs.json", []) if job["attempts"] or job.get("crashes")]
    if stage is None:
        run_config(run_dir)
        started = [job for job in jobs if job["stage"] != "finish"]
        bad = [job for job in started if job["state"] not in ("COMPLETED", "RUNNING")]
        running = [job for job in started if job["state"] == "RUNNING"]
        stage = (running or bad or started or [{"stage": "shard"}])[-1]["stage"]
    error = ledger.failure(run_dir, stage)
    own = rank if rank is not None else (error or {"rank": 0})["rank"]
    submitted = [job for job in jobs if job["stage"] == stage]
    if error and submitted:  # a traceback is in what the process printed
        return Path(submitted[-1]["logs"]) / f"{submitted[-1]['id']}_{own}_log.err"
    return run_dir / "logs" / stage / f"rank{own}.log"

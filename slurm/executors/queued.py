"""What Slurm already holds of the runs of a launch, so that no job is submitted twice."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.prepare import changes, listed
from pipeline.rundir.record import read_json, run_config
from slurm import ledger
from slurm.chain import SHARED, Chain, Run, Step, output_of, part_of
from slurm.executors import Executor
from slurm.overview import all_runs
from slurm.queue import FINAL
from slurm.resources import FINISH

Entry = tuple[Path, dict[str, Any]]  # a run directory, and an entry of its jobs.json


@dataclass(frozen=True)
class QueuedJob:
    """A job that has not ended, and the settings that it works with."""

    id: str
    state: str
    config: RunConfig


def without_queued(runs: list[Run], chain: Chain, executor: Executor) -> Chain:
    """Leave out the steps that a queued or running job does already.

    Raises ConfigError if such a job works with other settings than this launch asks for.
    """
    queued = _queued_jobs(runs, executor)
    doing: dict[Path, QueuedJob] = {}
    for step in chain.steps:
        job = _job_for(step, queued.get(step.output, []))
        if job:
            doing[step.output] = job
    steps, notes = [], list(chain.notes)
    for step in chain.steps:
        whole = output_of(step.run, step.stage)
        if step.output not in doing and whole not in doing:  # the whole stage waits for its own parts
            steps.append(step)
        elif step.output == whole:
            job = doing[whole]
            notes.append(f"{step.run.config.name}: {step.stage}: job {job.id} does it already ({job.state})")
    ids = {output: job.id for output, job in doing.items()}
    return Chain(steps, notes, ids, _finish_of(runs, queued))


def _finish_of(runs: list[Run], queued: dict[Path, list[QueuedJob]]) -> str:
    """Return the id of the queued job that finishes all of `runs`, or ""."""
    ids = [{job.id for job in queued.get(run.run_dir / FINISH, [])} for run in runs]
    common = set.intersection(*ids)
    return max(common, default="")


# ---- what is queued


def _queued_jobs(runs: list[Run], executor: Executor) -> dict[Path, list[QueuedJob]]:
    """Return the jobs that Slurm knows and that have not ended, by what they fill."""
    entries = [*_own_entries(runs), *_shared_entries(runs)]
    entries = [(run_dir, job) for run_dir, job in entries if job.get("executor") == executor.name]
    states = executor.states([job for _, job in entries]) if entries else []
    settings: dict[Path, RunConfig] = {}  # to read each file once
    found: dict[Path, list[QueuedJob]] = {}
    for (run_dir, job), state in zip(entries, states, strict=True):
        if state is None or state in FINAL:
            continue
        file = _settings_file(run_dir, job)
        config = settings[file] = settings.get(file) or run_config(run_dir, file)
        output = output_of(Run(config, run_dir), job["stage"])
        if "part" in job:
            output = part_of(output, *job["part"])
        found.setdefault(output, []).append(QueuedJob(job["id"], state, config))
    return found


def _own_entries(runs: list[Run]) -> Iterable[Entry]:
    for run in runs:
        for job in _open_jobs(run.run_dir):
            yield run.run_dir, job


def _shared_entries(runs: list[Run]) -> Iterable[Entry]:
    """Jobs of other runs beside these that make shards or a classifier."""
    own = {run.run_dir for run in runs}
    for runs_dir in dict.fromkeys(Path(run.config.runs_dir) for run in runs):
        for run_dir in all_runs(runs_dir):
            if run_dir in own:
                continue
            jobs = []
            with suppress(UserError, OSError):  # a colleague's run may be closed to others
                jobs = [job for job in _open_jobs(run_dir) if job["stage"] in SHARED]
            for job in jobs:
                yield run_dir, job


def _open_jobs(run_dir: Path) -> list[dict[str, Any]]:
    return [job for job in read_json(run_dir / "jobs.json", []) if job["state"] not in FINAL]


def _settings_file(run_dir: Path, job: dict[str, Any]) -> Path:
    """Return the file with the settings of a job: its own, or that of its run."""
    _, _, task = job["id"].partition("_")
    own = ledger.logs_of(run_dir, job) / f"config_{task or 0}.yaml"
    return own if own.exists() else run_dir / "config.yaml"


# ---- is it the same?


def _job_for(step: Step, jobs: list[QueuedJob]) -> QueuedJob | None:
    """Return the job that does the step. Raises ConfigError if it does it with other settings."""
    if step.stage in SHARED:  # the folder stands for the settings
        return jobs[-1] if jobs else None
    for job in jobs:
        if not _differing(job.config, step):
            return job
    if jobs and not step.run.evaluates_only:  # evaluations with other settings stand beside each other
        job = jobs[-1]
        raise ConfigError(
            f"{step.run.run_dir}: job {job.id} ({step.stage}, {job.state}) works with other settings "
            f"({listed(_differing(job.config, step))}); wait for its end, or stop it first: "
            f"`tools/cancel.py {step.run.run_dir}`"
        )
    return None


def _differing(queued: RunConfig, step: Step) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which a job differs from a step, {key: (job's, step's)}."""
    ignored = ("runs_dir",) if step.stage == "eval" else ("runs_dir", "eval.")  # a moved run is the same
    found = changes(queued, step.run.config)
    return {key: pair for key, pair in found.items() if not key.startswith(ignored)}

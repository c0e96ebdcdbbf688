"""An executor runs the jobs of a launch: in this process, on this machine, or on a Slurm cluster.

A new executor is a class in a file beside this one, its line in EXECUTORS, and its name in
`EXECUTOR_NAMES` of the configuration's schema.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config.load import dump
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.rundir.files import write_text
from slurm import ledger

if TYPE_CHECKING:
    from submitit import Job

    from slurm.chain import Chain, Run, Step

EXECUTORS = {
    "local": "slurm.executors.local:LocalExecutor",
    "debug": "slurm.executors.local:DebugExecutor",
    "slurm": "slurm.executors.cluster:SlurmExecutor",
}
SLURM_KEYS = ("partition", "account", "qos", "constraint", "setup", "extra_sbatch")


def executor_named(name: str) -> Executor:
    """Return the executor of that name in EXECUTORS; its module is imported only now."""
    module, _, class_name = EXECUTORS[name].partition(":")
    found: Executor = getattr(import_module(module), class_name)(name)
    return found


class Executor(ABC):
    """How the launcher checks, describes, starts, watches and cancels jobs."""

    many_nodes: ClassVar[bool] = False  # a job may use several nodes
    job_arrays: ClassVar[bool] = False  # jobs of one stage may run at the same time
    unused_keys: ClassVar[tuple[str, ...]] = SLURM_KEYS  # keys of `cluster` without an effect here

    def __init__(self, name: str) -> None:
        """`name`: its key in EXECUTORS, recorded with every job."""
        self.name = name

    @abstractmethod
    def resources(self, config: RunConfig, stage: str) -> ClusterConfig:
        """Return what a stage gets here. Raises ConfigError that names the key that cannot be satisfied."""

    @abstractmethod
    def place(self, run: Run) -> str:
        """Say in one line on what a run trains."""

    @abstractmethod
    def check(self, runs: list[Run], chain: Chain, preflight: bool) -> list[str]:
        """Check the launch before anything is written, and return warnings. Raises ConfigError.

        `preflight`: also run the checks that may be skipped.
        """

    def without_queued(self, runs: list[Run], chain: Chain) -> Chain:
        """Leave out the steps that a job does already which goes on without its launcher. Writes nothing."""
        return chain

    @abstractmethod
    def describe(self, chain: Chain) -> list[str]:
        """Describe each job of the launch as text (dry run). Writes nothing."""

    @abstractmethod
    def launch(self, runs: list[Run], chain: Chain, sweep: Path | None, wait: bool) -> None:
        """Start the chain, and follow it if jobs run here or if `wait` is set. `sweep`: its folder.

        Raises UserError, or SystemExit 1 if a stage failed and 130 after Ctrl-C.
        """

    @abstractmethod
    def states(self, jobs: list[dict[str, Any]]) -> list[str | None]:
        """Return the state of each of these entries of jobs.json; None if it is not known here."""

    @abstractmethod
    def cancel(self, jobs: list[dict[str, Any]]) -> list[str]:
        """Ask the jobs of these entries of jobs.json to stop; return a line for each. Raises UserError."""

    @abstractmethod
    def hand_over(
        self,
        config: RunConfig,
        stage: str,
        folder: Path,
        dependency: str | None,
        calls: Sequence[Callable[[], None]],
    ) -> list[Job[None]]:
        """Give submitit one job, or one array if there are several calls. Raises ConfigError if refused.

        `folder`: of this submission.
        """

    def process_of(self, job: Job[None]) -> dict[str, Any] | None:
        """The process on this host that stands for a job, as `ledger.process` describes it."""
        return None

    def submit(self, steps: list[Step], dependency: str | None = None) -> list[Job[None]]:
        """Submit steps as one job, or as one array if there are several, and record them in jobs.json."""
        from slurm.job import StageJob

        first = steps[0]
        folder = submission_folder(first.run.run_dir, first.stage)
        for step in steps:
            ledger.forget_failure(step.run.run_dir, step.stage)
        listed = [{"run_dir": str(step.run.run_dir), "stage": step.stage} for step in steps]
        write_text(folder / "steps.json", json.dumps(listed))  # read by slurm.restart
        calls = []
        for i, step in enumerate(steps):
            own = ""
            if step.run.evaluates_only:
                own = str(folder / f"config_{i}.yaml")
                write_text(Path(own), dump(step.run.config))
            calls.append(StageJob(str(step.run.run_dir), step.stage, step.part, own))
        jobs = self.hand_over(first.run.config, first.stage, folder, dependency, calls)
        for step, job in zip(steps, jobs, strict=True):
            submission = ledger.Submission(
                executor=self.name,
                logs=str(folder),
                after=dependency or "",
                part=step.part,
                process=self.process_of(job),
            )
            ledger.submitted(step.run.run_dir, step.stage, job.job_id, submission)
        return jobs


def submission_folder(run_dir: Path, stage: str) -> Path:
    """Return a new folder for one submission.

    Job ids and process ids repeat, and submitit would take an old result for a new one.
    """
    parent = run_dir / "logs" / stage / "submitit"
    taken = [int(folder.name) for folder in parent.glob("*") if folder.name.isdigit()]
    return parent / str(max(taken, default=0) + 1)


@contextmanager
def outside_jobs(**variables: object) -> Iterator[None]:
    """Hide the variables of a job that this process may be part of, and set `variables` for new jobs."""
    from submitit.core.utils import environment_variables
    from submitit.helpers import clean_env

    pmix = [name for name in os.environ if name.startswith("PMIX_")]
    if "SLURM_CONF" in os.environ:  # it says which cluster to talk to, so it is not part of a job
        variables = {"SLURM_CONF": os.environ["SLURM_CONF"], **variables}
    with clean_env(extra_names=pmix), environment_variables(**variables):
        yield

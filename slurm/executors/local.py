"""The executors of this machine: run one job after the other, and stop on Ctrl-C or a hang-up."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import PHASES, ClusterConfig, RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.prepare import ROOT
from pipeline.rundir.record import read_json
from pipeline.runtime.owner import describe
from slurm import ledger
from slurm.chain import Chain, Run, Step
from slurm.executors import Executor, outside_jobs
from slurm.executors.following import (
    interrupts_held,
    kill_ranks,
    logs_of,
    require_success,
    stop_signals_interrupt,
    terminal_signals_blocked,
    watch,
)
from slurm.executors.view import StageView, tell, tell_error
from slurm.queue import FINAL
from slurm.rank import GPU_CHOICE, visible_gpus
from slurm.resources import counted, gpu_request, idle_gpus, require_a_gpu_each, stage_resources

if TYPE_CHECKING:
    from submitit import Job


def _require_idle(runs: list[Run]) -> None:
    """Raise ConfigError if a job of this host works with a configuration that the launch would replace."""
    for run in runs:
        if run.evaluates_only:
            continue
        for job in read_json(run.run_dir / "jobs.json", []):
            process = job.get("process")
            if not process or job["state"] in FINAL or process["pid"] == os.getpid():
                continue
            if ledger.alive(process):
                doing = "trained" if job["stage"] in PHASES else f"used by the stage {job['stage']}"
                raise ConfigError(
                    f"{run.run_dir}: is being {doing} by {describe({**process, 'job': job['id']})}; wait for "
                    f"it, cancel it (`python tools/cancel.py {run.run_dir}`), or use another name="
                )


# ---- executors


class LocalExecutor(Executor):
    """Each job is a set of processes of this machine, one per rank."""

    def resources(self, config: RunConfig, stage: str) -> ClusterConfig:
        """Return what the stage gets here; `auto` becomes all visible GPUs, with one rank for each."""
        wanted = stage_resources(config, stage)
        visible = visible_gpus()
        if wanted.gpus_per_node == "auto":
            ranks = len(visible) or wanted.tasks_per_node
            return dataclasses.replace(wanted, gpus_per_node=len(visible), tasks_per_node=ranks)
        count = gpu_request(wanted, stage).count
        if count > len(visible):
            choice = os.environ.get(GPU_CHOICE)
            source = "nvidia-smi -L" if choice is None else f"{GPU_CHOICE}={choice!r}"
            raise ConfigError(
                f"key 'cluster.gpus_per_node' for stage {stage}: asked for {count} GPUs, but {source} "
                f"shows {len(visible)}; ask for at most {len(visible)}, or 0 for the CPU"
            )
        require_a_gpu_each(wanted, stage, count)
        return dataclasses.replace(wanted, gpus_per_node=count)

    def place(self, run: Run) -> str:
        """GPUs and processes of the train stage."""
        wanted = self.resources(run.config, "train")
        return f"training on {_devices(wanted)}: {_processes(wanted)} on this machine"

    def check(self, runs: list[Run], chain: Chain, preflight: bool) -> list[str]:
        """Check what every stage asks for, then paths, space, GPUs and the tracker's store."""
        from slurm.preflight import check_this_machine
        from slurm.preflight.checks import batch_warnings

        _require_idle(runs if chain.steps else [])
        found: list[str] = []
        for step in chain.steps:
            wanted = self.resources(step.run.config, step.stage)
            gpus = gpu_request(wanted, step.stage).count
            if gpus:
                found += idle_gpus(wanted, step.stage, gpus)
                found += batch_warnings(step.run.config, wanted.tasks_per_node, True, step.stage)
        if preflight:
            found += check_this_machine(runs, chain)
        return list(dict.fromkeys(found))

    def describe(self, chain: Chain) -> list[str]:
        """Name each job, its predecessors and its processes."""
        names = {step.output: step.name for step in chain.steps}
        parts = []
        for step in chain.steps:
            wanted = self.resources(step.run.config, step.stage)
            after = ", ".join(names[output] for output in step.after) or "nothing"
            parts.append(
                f"# job {step.name}, after: {after}\n"
                f"# {self.name}: {_processes(wanted)} on this machine, {_devices(wanted)}\n"
            )
        return parts

    def launch(self, runs: list[Run], chain: Chain, sweep: Path | None, wait: bool) -> None:
        """Run the chain, then show the numbers of the new evaluations."""
        from slurm.job import finish

        try:
            with self.syncing() as sync:
                for run in runs:
                    sync(run.run_dir)  # a new store takes seconds, which the first stage hides
                self.run_all(chain, after_each=sync)
        except KeyboardInterrupt:
            tell_error(f"stopped; continue with: python {shlex.join(sys.argv)}")
            raise SystemExit(130) from None
        if any(step.stage == "eval" for step in chain.steps):
            tell("\n" + finish([run.run_dir for run in runs], sweep))

    def syncing(self) -> AbstractContextManager[Callable[[Path], object]]:
        """Send runs to the tracker while the next stage works."""
        from pipeline.tracking.sync import sync_beside

        return sync_beside()

    def run_all(self, chain: Chain, after_each: Callable[[Path], object]) -> None:
        """Run the jobs one after the other, and call `after_each(run_dir)` after each, also after a failure.

        Raises UserError with a stage's message, SystemExit with the end of the failing rank's log, and
        KeyboardInterrupt (also for SIGTERM and SIGHUP) after the job has stopped.
        """
        with stop_signals_interrupt():
            for number, step in enumerate(chain.steps, 1):
                label = f"[{number}/{len(chain.steps)}] {step.run.config.name} {step.stage}"
                view = StageView(logs_of(step) / "rank0.log", label)
                with interrupts_held() as release:  # until `finish` can stop the job
                    (job,) = self.submit([step])
                    try:
                        self.finish(job, step, view, release)
                        require_success(job, step)
                        view.end()
                    finally:
                        after_each(step.run.run_dir)
                        _remove_link(job.paths.folder)

    def hand_over(
        self,
        config: RunConfig,
        stage: str,
        folder: Path,
        dependency: str | None,
        calls: Sequence[Callable[[], None]],
    ) -> list[Job[None]]:
        """Start the processes of one job; they run the code of this checkout."""
        from submitit.local.local import LocalExecutor as Submitter

        wanted = self.resources(config, stage)
        choice = f"{GPU_CHOICE}={','.join(_chosen_gpus(wanted))}"
        python = shlex.quote(sys.executable)
        if wanted.python:  # no shell reads it here
            python = os.path.expanduser(os.path.expandvars(wanted.python))
        # submitit would number the GPUs from 0, whatever the user chose.
        command = f"env {shlex.quote(choice)} {python}"
        executor = Submitter(_without_percent(folder), max_num_timeout=wanted.max_timeouts, python=command)
        executor.update_parameters(
            tasks_per_node=wanted.tasks_per_node,
            timeout_min=wanted.timeout_min,
            signal_delay_s=wanted.signal_delay_s,
        )
        with outside_jobs(PYTHONPATH=_python_path()), terminal_signals_blocked():
            return [executor.submit(call) for call in calls]

    def process_of(self, job: Job[None]) -> dict[str, Any]:
        """The process of submitit's controller."""
        return ledger.process(int(job.job_id))

    def finish(self, job: Job[None], step: Step, view: StageView, release: Callable[[], None]) -> None:
        """Show how far the stage is until all ranks have left. `release` lets Ctrl-C through again.

        Ctrl-C asks the ranks to stop, a second one kills them.
        """
        try:
            release()
            watch(job, step, view)
        except KeyboardInterrupt:
            os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller passes it on to the ranks
            tell_error(f"{step.name}: stopping; the step in progress is finished and saved (again: kill)")
            try:
                watch(job, step, view)
            except KeyboardInterrupt:
                kill_ranks(job)
                watch(job, step, view)
            raise

    def states(self, jobs: list[dict[str, Any]]) -> list[str | None]:
        """A job whose process is gone, and that recorded no end, has failed."""
        found: list[str | None] = []
        for job in jobs:
            gone = "process" in job and ledger.alive(job["process"]) is False
            found.append("FAILED" if gone else None)
        return found

    def cancel(self, jobs: list[dict[str, Any]]) -> list[str]:
        """Ask the jobs of this host to stop. Raises UserError that names those which cannot be asked."""
        lines = []
        refused = []
        for job in jobs:
            process = job.get("process")
            if not process:
                continue
            alive = ledger.alive(process)
            name = f"{job['stage']} job {job['id']}"
            if alive is None:
                refused.append(f"{name} was started on {process['host']}: cancel it there")
            elif alive:
                try:
                    lines.append(_stop(job, process["pid"]))
                except PermissionError:
                    pid = process["pid"]
                    refused.append(f"{name} runs as another user, who alone can cancel it (process {pid})")
        if refused:
            raise UserError("\n".join([*lines, *refused]))
        return lines


class DebugExecutor(LocalExecutor):
    """Every job is one rank in this very process: breakpoints work, and an error opens the debugger."""

    def syncing(self) -> AbstractContextManager[Callable[[Path], object]]:
        """Send runs to the tracker between the stages: the process holds no second thread."""
        from pipeline.tracking.sync import sync_run

        return nullcontext(sync_run)

    def resources(self, config: RunConfig, stage: str) -> ClusterConfig:
        """One rank, with at most one GPU."""
        wanted = super().resources(config, stage)
        gpus = min(1, gpu_request(wanted, stage).count)
        return dataclasses.replace(wanted, tasks_per_node=1, gpus_per_node=gpus)

    def hand_over(
        self,
        config: RunConfig,
        stage: str,
        folder: Path,
        dependency: str | None,
        calls: Sequence[Callable[[], None]],
    ) -> list[Job[None]]:
        """Prepare the job; it runs in `finish`, with the environment that it finds here."""
        from submitit.local.debug import DebugExecutor as Submitter

        choice = {GPU_CHOICE: ",".join(_chosen_gpus(self.resources(config, stage)))}
        with outside_jobs(**choice):
            executor = Submitter(_without_percent(folder))
            return [executor.submit(call) for call in calls]

    def process_of(self, job: Job[None]) -> dict[str, Any]:
        """This process."""
        return ledger.process(os.getpid())

    def finish(self, job: Job[None], step: Step, view: StageView, release: Callable[[], None]) -> None:
        """Run the job. Its errors open the debugger and then come back here with their traceback."""
        release()
        with suppress(SystemExit):
            job.results()


def _without_percent(folder: Path) -> Path:
    """Return `folder`, or a link to it if submitit would replace a %j or %t somewhere in its path."""
    if "%" not in str(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    link = Path(tempfile.mkdtemp(prefix="cvae-job-")) / "logs"
    link.symlink_to(folder)
    return link


def _remove_link(folder: Path) -> None:
    """Remove the link that `_without_percent` made."""
    if folder.is_symlink():
        folder.unlink()
        folder.parent.rmdir()


def _stop(job: dict[str, Any], pid: int) -> str:
    """Ask the process of a job to stop, and return a line that says so. Raises PermissionError."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return f"{job['stage']} job {job['id']} has just ended"
    return f"cancelled: {job['id']} ({job['stage']}); it saves its work and ends"


def _devices(wanted: ClusterConfig) -> str:
    gpus = _chosen_gpus(wanted)
    if not gpus:
        return "the CPU"
    return f"{counted(len(gpus), 'GPU', 'GPUs')} ({GPU_CHOICE}={','.join(gpus)})"


def _processes(wanted: ClusterConfig) -> str:
    return counted(wanted.tasks_per_node, "process", "processes")


def _chosen_gpus(wanted: ClusterConfig) -> list[str]:
    count = wanted.gpus_per_node
    assert isinstance(count, int)
    return visible_gpus()[:count]


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

"""The executor of a Slurm cluster: submit every job at once, with dependencies. The cluster does the rest."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.rundir.layout import code_dir
from slurm import ledger
from slurm.chain import Chain, Run, Step, batches, dependencies
from slurm.executors import Executor, outside_jobs, submission_folder
from slurm.executors.view import tell, tell_error
from slurm.queue import array_of, job_states
from slurm.resources import FINISH, asks_for_gpus, counted, gpu_request, require_a_gpu_each, stage_resources
from slurm.sbatch import code, sbatch_script, snapshot, snapshot_folder, submitter

if TYPE_CHECKING:
    from submitit import Job


SLURM_PATTERN = re.compile(r"%(%|\d*[AabJjNnstuxm])|\n")  # of `sbatch --output`, and submitit's own


class SlurmExecutor(Executor):
    """One job or job array per stage, submitted by sbatch."""

    many_nodes = True
    job_arrays = True
    unused_keys = ()

    def resources(self, config: RunConfig, stage: str) -> ClusterConfig:
        """Return what the stage asks Slurm for; `auto` GPUs are refused."""
        wanted = stage_resources(config, stage)
        require_a_gpu_each(wanted, stage, gpu_request(wanted, stage).count)
        return wanted

    def place(self, run: Run) -> str:
        """Nodes, processes and GPUs of the train stage."""
        wanted = self.resources(run.config, "train")
        gpus = gpu_request(wanted, "train")
        kind = f" of type {gpus.type}" if gpus.type else ""
        devices = f"{counted(gpus.count, 'GPU', 'GPUs')}{kind} per node" if gpus.count else "no GPU"
        if not gpus.count and asks_for_gpus(wanted, "train"):
            devices = "GPUs as cluster.extra_sbatch asks"
        nodes = counted(wanted.nodes, "node", "nodes")
        processes = counted(wanted.tasks_per_node, "process", "processes")
        return f"training on Slurm: {nodes} x {processes}, {devices}"

    def check(self, runs: list[Run], chain: Chain, preflight: bool) -> list[str]:
        """Require sbatch and sound requests, then run the preflight."""
        from slurm.preflight import check_cluster

        if not (shutil.which("sbatch") and shutil.which("srun")):
            raise ConfigError(
                "key 'cluster.executor': got 'slurm', but this machine has no sbatch and srun; "
                "launch from a login node, use --cluster local, or look at --dry-run"
            )
        for step in chain.steps:
            self.resources(step.run.config, step.stage)
            _require_plain_percent(step.run.run_dir)
        return check_cluster(runs, chain) if preflight else []

    def without_queued(self, runs: list[Run], chain: Chain) -> Chain:
        """Leave out what is queued or running. Raises ConfigError if it has other settings."""
        from slurm.executors.queued import without_queued

        return without_queued(runs, chain, self)

    def describe(self, chain: Chain) -> list[str]:
        """Return the very scripts that sbatch would get, with job names in place of ids."""
        parts = []
        ids = dict(chain.queued)
        for group in batches(chain):
            first = group[0]
            script = script_of(group, dependencies(group, ids, chain.queued.values()))
            kind = "array" if len(group) > 1 else "job"
            parts.append(f"# {kind} {', '.join(step.name for step in group)}\n{script}")
            for i, step in enumerate(group):
                ids[step.output] = f"<{first.name}>_{i}" if len(group) > 1 else f"<{first.name}>"
        return parts

    def launch(self, runs: list[Run], chain: Chain, sweep: Path | None, wait: bool) -> None:
        """Submit the chain; with `wait` follow it to its end."""
        from slurm.announce import shown
        from slurm.status import as_table, follow, survey

        self.submit_all(chain, runs, sweep)
        run_dirs = [run.run_dir for run in runs]
        listed = shlex.join(shown(run_dir) for run_dir in run_dirs)
        command = f"python tools/status.py --follow {listed}"
        if not wait:
            tell(f"\nnext:\n  {command}\n  python tools/cancel.py {listed}")
            return
        try:
            for line in follow(run_dirs):
                tell(line)
        except KeyboardInterrupt:
            tell_error(f"the jobs go on; follow them again: {command}")
            raise SystemExit(130) from None
        statuses = survey(run_dirs)
        tell(as_table(statuses))
        if any(status.state != "COMPLETED" for status in statuses):
            raise SystemExit(1)

    def submit_all(self, chain: Chain, runs: list[Run], sweep: Path | None = None) -> list[str]:
        """Submit every job after the jobs it needs, and return the new ids.

        Raises ConfigError with sbatch's answer, and with the jobs that are already queued.
        """
        ids = dict(chain.queued)
        new: list[str] = []
        try:
            for group in batches(chain):
                dependency = dependencies(group, ids, chain.queued.values())
                jobs = self.submit(group, dependency)
                new += [job.job_id for job in jobs]
                for step, job in zip(group, jobs, strict=True):
                    ids[step.output] = job.job_id
                tell(_announcement(group, array_of(jobs[0].job_id), dependency))
            if _needs_finish(chain):
                new.append(self.submit_finish(runs, sweep, list(ids.values())).job_id)
                tell(f"{FINISH}: job {new[-1]}, after all others")
        except ConfigError as error:
            queued = dict.fromkeys(array_of(job) for job in new)
            hint = f"; submitted before it and still queued: scancel {' '.join(queued)}" if queued else ""
            raise ConfigError(f"{error}{hint}") from None
        return new

    def submit_finish(self, runs: list[Run], sweep: Path | None, after: list[str]) -> Job[None]:
        """Submit the job that runs when all others have ended, well or badly."""
        from slurm.job import FinishJob

        config = runs[0].config
        folder = submission_folder(runs[0].run_dir, FINISH)
        call = FinishJob(tuple(str(run.run_dir) for run in runs), str(sweep) if sweep else None)
        dependency = ":".join(["afterany", *dict.fromkeys(array_of(job) for job in after)])
        (job,) = self.hand_over(config, FINISH, folder, dependency, [call])
        for run in runs:
            submission = ledger.Submission(self.name, str(folder), dependency)
            ledger.submitted(run.run_dir, FINISH, job.job_id, submission)
        return job

    def hand_over(
        self,
        config: RunConfig,
        stage: str,
        folder: Path,
        dependency: str | None,
        calls: Sequence[Callable[[], None]],
    ) -> list[Job[None]]:
        """Submit one job or array that runs a copy of today's code."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = submitter(config, stage, folder, dependency, snapshot(partial(code_dir, config)))
        with outside_jobs():
            try:
                if len(calls) == 1:
                    return [executor.submit(calls[0])]
                with executor.batch():
                    return [executor.submit(call) for call in calls]
            except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
                name = f"{config.name}-{stage}"
                raise ConfigError(f"{name}: the job was refused: {str(error).strip()}") from None

    def states(self, jobs: list[dict[str, Any]]) -> list[str | None]:
        """Ask squeue, sacct and scontrol."""
        found = job_states([job["id"] for job in jobs])
        return [found.get(job["id"]) for job in jobs]

    def cancel(self, jobs: list[dict[str, Any]]) -> list[str]:
        """Cancel the jobs by scancel. The finishing job stays: it records the end of the others."""
        ids = [job["id"] for job in jobs if job["stage"] != FINISH]
        if not ids:
            return []
        try:
            done = subprocess.run(["scancel", *ids], capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(
                f"scancel {' '.join(ids)}: this machine has no scancel; use a login node"
            ) from None
        if done.returncode:
            raise UserError(f"scancel {' '.join(ids)}: {done.stderr.strip()}")
        return [f"cancelled: {' '.join(ids)}"]


def _require_plain_percent(run_dir: Path) -> None:
    """Raise ConfigError if Slurm would replace a part of the path, as %u by the user's name."""
    found = SLURM_PATTERN.search(str(run_dir))
    if found:
        raise ConfigError(
            f"key 'runs_dir': {str(run_dir)!r}: Slurm does not take {found[0]!r} in the names of log files "
            "as it is; use a folder without it"
        )


def script_of(group: list[Step], dependency: str | None) -> str:
    """Return the script of one job or array."""
    run = group[0].run
    stage = group[0].stage
    folder = submission_folder(run.run_dir, stage)
    code_folder = snapshot_folder(partial(code_dir, run.config), code())
    return sbatch_script(run.config, stage, folder, dependency, code_folder, len(group))


def _needs_finish(chain: Chain) -> bool:
    """Whether the launch trains or evaluates, and no queued job finishes its runs afterwards."""
    if any(step.stage in ("train", "eval") for step in chain.steps):
        return True
    return not chain.finish and any(output.name in ("train", "eval") for output in chain.queued)


def _announcement(group: list[Step], number: str, dependency: str | None) -> str:
    from slurm.announce import shown

    first = group[0]
    name = first.name
    if len(group) > 1:
        parts = " parts" if first.part else ""
        name = f"{first.stage}{parts} (array of {len(group)})"
    after = f", {dependency}" if dependency else ""
    return f"{name}: job {number}{after}, logs in {shown(first.run.run_dir / 'logs' / first.stage)}"

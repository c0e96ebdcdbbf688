"""Hand the chain to submitit: on Slurm all jobs at once with dependencies, on this machine one after the other."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.rundir import ROOT
from pipeline.schema import RunConfig
from slurm import ledger
from slurm.chain import Chain, Step, stage_resources

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job


def sbatch_parameters(config: RunConfig, stage: str, dependencies: list[str]) -> dict[str, Any]:
    """Parameters of one job for submitit's AutoExecutor; other executors than Slurm ignore those with the prefix slurm_."""
    wanted = stage_resources(config, stage)
    extra: dict[str, Any] = {"requeue": True}
    if dependencies:  # a dependent of a failed job would else stay pending for ever
        extra["kill-on-invalid-dep"] = "yes"
    extra |= {key: True if value.lower() == "true" else value for key, value in wanted.extra_sbatch.items()}
    search_path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return {
        "name": f"{config.name}-{stage}",
        "nodes": wanted.nodes,
        "tasks_per_node": wanted.tasks_per_node,
        "gpus_per_node": wanted.gpus_per_node or None,
        "cpus_per_task": wanted.cpus_per_task,
        "mem_gb": wanted.mem_gb,
        "timeout_min": wanted.timeout_min,
        "slurm_partition": wanted.partition,
        "slurm_account": wanted.account,
        "slurm_qos": wanted.qos,
        "slurm_constraint": wanted.constraint,
        "slurm_signal_delay_s": wanted.signal_delay_s,
        "slurm_dependency": ":".join(["afterok", *dependencies]) if dependencies else None,
        "slurm_setup": [*wanted.setup, search_path],
        # srun does not inherit --cpus-per-task; a rank that dies must take its peers along.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={wanted.cpus_per_task}"],
        "slurm_additional_parameters": extra,
    }


def require_slurm() -> None:
    """Raise ConfigError where this machine cannot submit."""
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError("key 'cluster.executor': got 'slurm', but there is no sbatch and srun here: use a login node, or --dry-run")


def make_executor(config: RunConfig, stage: str, folder: Path, dependencies: list[str]) -> AutoExecutor:
    """The executor of one job, not yet used."""
    from submitit import AutoExecutor

    name, python, timeouts = config.cluster.executor, config.cluster.python, config.cluster.max_timeouts
    limits = {"slurm_max_num_timeout": timeouts, "local_max_num_timeout": timeouts}
    executor = AutoExecutor(folder, cluster=name, slurm_python=python, local_python=python, **limits)
    executor.update_parameters(**sbatch_parameters(config, stage, dependencies))
    return executor


def submit(step: Step, dependencies: list[str]) -> Job[None]:
    """Submit one job and note it in jobs.json; raises ConfigError with what sbatch said."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from slurm.job import StageJob

    run_dir, config = step.run.run_dir, step.run.config
    folder = submission_folder(step)
    ledger.forget_failure(run_dir, step.stage)
    executor = make_executor(config, step.stage, folder, dependencies)
    with _submission_environment(config.cluster.executor):
        try:
            job = executor.submit(StageJob(str(run_dir), step.stage))
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
            raise ConfigError(f"{step.name}: the job was refused: {str(error).strip()}") from None
    ledger.submitted(run_dir, step.stage, job.job_id, config.cluster.executor, dependencies, folder)
    return job


def submit_all(chain: Chain) -> None:
    """Submit every job to Slurm, each after the jobs that it needs, and return; the cluster does the rest."""
    ids: dict[Path, str] = {}
    try:
        for step in chain.steps:
            dependencies = [ids[output] for output in step.after]
            ids[step.output] = submit(step, dependencies).job_id
            after = f" after {', '.join(dependencies)}" if dependencies else ""
            print(f"{step.name}: job {ids[step.output]}{after}, logs in {step.run.run_dir / 'logs' / step.stage}")
    except ConfigError as error:
        hint = f"; submitted before it and still queued: scancel {' '.join(ids.values())}" if ids else ""
        raise ConfigError(f"{error}{hint}") from None


def submission_folder(step: Step) -> Path:
    """A folder of its own for each submission: job and process numbers come again, and an old result would be taken for a new one."""
    parent = step.run.run_dir / "logs" / step.stage / "submitit"
    taken = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    return parent / str(max(taken, default=0) + 1)


@contextmanager
def _submission_environment(executor: str) -> Iterator[None]:
    """What a job inherits: nothing of a job that this process may be in, and on this machine a port and no Ctrl-C."""
    from submitit.core.utils import environment_variables
    from submitit.helpers import clean_env

    with clean_env(extra_names=[name for name in os.environ if name.startswith("PMIX_")]):
        if executor == "slurm":
            yield
            return
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # Ctrl-C reaches every process of a terminal: the ranks must hear it from the launcher, as a stop request.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with environment_variables(PYTHONPATH=path, MASTER_PORT=_free_port()):
                yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

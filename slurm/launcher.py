"""Hand the chain to submitit: on Slurm all jobs at once with dependencies, on this machine one after the other."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.prepare import ROOT
from pipeline.rundir.files import write_text
from pipeline.rundir.layout import shared_dir
from pipeline.runtime.ports import free_port
from slurm import ledger
from slurm.chain import FINISH, Chain, Run, Step, batches, stage_resources
from slurm.queue import array_of
from slurm.snapshot import snapshot

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job

# A job that was cancelled, ran out of time or was requeued is no longer RUNNING. Asked here and not in Python, which may be in a container.
TRAP = """\
restart_after_crash() {{
  code=$?
  [ $code -ne 0 ] || return
  scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING ' || return
  if {python} -m slurm.restart {folder} $code; then scontrol requeue "$SLURM_JOB_ID"; fi
}}
trap restart_after_crash EXIT"""


def sbatch_parameters(
    config: RunConfig, stage: str, folder: Path, dependency: str | None, code: Path
) -> dict[str, Any]:
    """Parameters of one job for submitit's AutoExecutor; other executors than Slurm ignore those with the prefix slurm_.

    `folder`: of the submission; `code`: from where the job imports.
    """
    wanted = stage_resources(config, stage)
    extra: dict[str, Any] = {
        "requeue": True,
        "chdir": str(code),
    }  # python -m puts the working directory before PYTHONPATH
    if dependency:  # a dependent of a failed job would else stay pending for ever
        extra["kill-on-invalid-dep"] = "yes"
    extra |= {key: True if value.lower() == "true" else value for key, value in wanted.extra_sbatch.items()}
    setup = [*wanted.setup, f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    if stage != FINISH:
        setup.append(
            TRAP.format(python=wanted.python or shlex.quote(sys.executable), folder=shlex.quote(str(folder)))
        )
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
        "slurm_dependency": dependency,
        "slurm_setup": setup,
        # srun does not inherit --cpus-per-task; a rank that dies must take its peers along.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={wanted.cpus_per_task}"],
        "slurm_additional_parameters": extra,
    }


def require_slurm() -> None:
    """Raise ConfigError where this machine cannot submit."""
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            "key 'cluster.executor': got 'slurm', but there is no sbatch and srun here: use a login node, or --dry-run"
        )


def make_executor(
    config: RunConfig, stage: str, folder: Path, dependency: str | None, code: Path
) -> AutoExecutor:
    """The executor of one job or array, not yet used."""
    from submitit import AutoExecutor

    name, python, timeouts = config.cluster.executor, config.cluster.python, config.cluster.max_timeouts
    limits = {"slurm_max_num_timeout": timeouts, "local_max_num_timeout": timeouts}
    executor = AutoExecutor(folder, cluster=name, slurm_python=python, local_python=python, **limits)
    executor.update_parameters(**sbatch_parameters(config, stage, folder, dependency, code))
    return executor


def submit(steps: list[Step], dependency: str | None = None) -> list[Job[None]]:
    """Submit steps as one job, or as one array where there are several, and note them in jobs.json.

    Raises ConfigError with what sbatch said.
    """
    from slurm.job import StageJob

    first = steps[0]
    config, folder = first.run.config, submission_folder(first.run.run_dir, first.stage)
    for step in steps:
        ledger.forget_failure(step.run.run_dir, step.stage)
    where = [{"run_dir": str(step.run.run_dir), "stage": step.stage} for step in steps]
    write_text(folder / "steps.json", json.dumps(where))  # read by slurm.restart
    calls = [StageJob(str(step.run.run_dir), step.stage, step.part) for step in steps]
    jobs = _submit(first.name, config, first.stage, folder, dependency, calls)
    for step, job in zip(steps, jobs, strict=True):
        ledger.submitted(
            step.run.run_dir, step.stage, job.job_id, config.cluster.executor, dependency, folder, step.part
        )
    return jobs


def submit_finish(runs: list[Run], sweep: Path | None, after: list[str]) -> Job[None]:
    """Submit the job that runs when everything else has ended, well or badly: it tells MLflow and compares."""
    from slurm.job import FinishJob

    config, folder = runs[0].config, submission_folder(runs[0].run_dir, FINISH)
    call = FinishJob(tuple(str(run.run_dir) for run in runs), str(sweep) if sweep else None)
    dependency = ":".join(["afterany", *dict.fromkeys(array_of(job) for job in after)])
    (job,) = _submit(f"{config.name}-{FINISH}", config, FINISH, folder, dependency, [call])
    for run in runs:
        ledger.submitted(run.run_dir, FINISH, job.job_id, config.cluster.executor, dependency, folder)
    return job


def _submit(
    name: str,
    config: RunConfig,
    stage: str,
    folder: Path,
    dependency: str | None,
    calls: Sequence[Callable[[], None]],
) -> list[Job[None]]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    on_slurm = config.cluster.executor == "slurm"
    executor = make_executor(
        config, stage, folder, dependency, snapshot(shared_dir(config)) if on_slurm else ROOT
    )
    with _submission_environment(config.cluster.executor):
        try:
            if len(calls) == 1:
                return [executor.submit(calls[0])]
            with executor.batch():
                return [executor.submit(call) for call in calls]
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
            raise ConfigError(f"{name}: the job was refused: {str(error).strip()}") from None


def submit_all(chain: Chain, runs: list[Run], sweep: Path | None = None) -> list[str]:
    """Submit every job to Slurm, each after those that it needs, and return their ids; the cluster does the rest."""
    ids: dict[Path, str] = {}
    groups = batches(chain)
    try:
        for group in groups:
            dependency = dependencies(group, ids)
            jobs = submit(group, dependency)
            ids |= {step.output: job.job_id for step, job in zip(group, jobs, strict=True)}
            first, number = group[0], array_of(jobs[0].job_id)
            name = (
                first.name
                if len(group) == 1
                else f"{first.stage}{' parts' if first.part else ''} (array of {len(group)})"
            )
            print(
                f"{name}: job {number}{f', {dependency}' if dependency else ''}, logs in {first.run.run_dir / 'logs' / first.stage}"
            )
        if any(step.stage in ("train", "eval") for step in chain.steps):
            job = submit_finish(runs, sweep, list(ids.values()))
            print(f"{FINISH}: job {job.job_id}, after all others")
            return [*ids.values(), job.job_id]
    except ConfigError as error:
        queued = dict.fromkeys(array_of(job) for job in ids.values())
        hint = f"; submitted before it and still queued: scancel {' '.join(queued)}" if ids else ""
        raise ConfigError(f"{error}{hint}") from None
    return list(ids.values())


def dependencies(group: list[Step], ids: dict[Path, str]) -> str | None:
    """sbatch's --dependency of an array whose steps wait for steps with the given job ids (12 or 12_3); None where there are none.

    Steps that all need the same jobs wait for these; element i that needs element i of another array waits for it alone.
    """
    needed = [[ids[output] for output in step.after] for step in group]
    arrays = dict.fromkeys(array_of(job) for jobs in needed for job in jobs)
    size = {array: sum(array_of(job) == array for job in ids.values()) for array in arrays}
    clauses = []
    for array in arrays:
        own = [[job for job in jobs if array_of(job) == array] for jobs in needed]
        if all(jobs == [f"{array}_{i}"] for i, jobs in enumerate(own)) and 1 < len(group) == size[array]:
            clauses.append(f"aftercorr:{array}")
        else:
            union = list(dict.fromkeys(job for jobs in own for job in jobs))
            clauses.append(":".join(["afterok", *([array] if len(union) == size[array] else union)]))
    plain = [clause.removeprefix("afterok:") for clause in clauses if clause.startswith("afterok")]
    rest = [clause for clause in clauses if not clause.startswith("afterok")]
    return ",".join([":".join(["afterok", *plain])] * bool(plain) + rest) or None


def submission_folder(run_dir: Path, stage: str) -> Path:
    """A folder of its own for each submission: job and process numbers come again, and an old result would be taken for a new one."""
    parent = run_dir / "logs" / stage / "submitit"
    taken = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    return parent / str(max(taken, default=0) + 1)


@contextmanager
def _submission_environment(executor: str) -> Iterator[None]:
    """What a job inherits: nothing of a job that this process may be in, and on this machine a port and no Ctrl-C."""
    from submitit.core.utils import environment_variables
    from submitit.helpers import clean_env

    conf = os.environ.get("SLURM_CONF")  # which cluster to talk to is no trace of a job
    with clean_env(extra_names=[name for name in os.environ if name.startswith("PMIX_")]):
        if executor == "slurm":
            with environment_variables(**({"SLURM_CONF": conf} if conf else {})):
                yield
            return
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # Ctrl-C reaches every process of a terminal: the ranks must hear it from the launcher, as a stop request.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with environment_variables(PYTHONPATH=path, MASTER_PORT=str(free_port())):
                yield
        finally:
            signal.signal(signal.SIGINT, previous)

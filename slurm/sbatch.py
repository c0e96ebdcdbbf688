"""The batch script of a job on the cluster, and its own copy of the code.

The copy protects queued jobs from edits that happen after the submission.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.prepare import ROOT
from pipeline.rundir.files import naming
from slurm.ledger import ATTEMPT_MARK
from slurm.resources import FINISH, gpu_request, stage_resources

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor as Submitter

# Only a job that is still RUNNING crashed. A cancelled, timed-out or requeued job has another state.
# The shell asks scontrol, because Python may run in a container that has no Slurm.
RESTART_TRAP = """\
restart_after_crash() {{
  code=$?
  [ $code -ne 0 ] || return
  scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING ' || return
  {path}
  if {python} -m slurm.restart {folder} $code; then scontrol requeue "$SLURM_JOB_ID"; fi
}}
trap restart_after_crash EXIT"""
MARK_ATTEMPT = f'echo "{ATTEMPT_MARK} ${{SLURM_RESTART_COUNT:-0}} of job $SLURM_JOB_ID" >&2'

PACKAGES = ("cvae", "pipeline", "slurm", "tools", "configs")
KINDS = (".py", ".yaml", ".txt", ".css")


# ---- the batch script


def submitter(
    config: RunConfig, stage: str, folder: Path, dependency: str | None, code_folder: Path
) -> Submitter:
    """Return submitit's executor for one job or array, with its parameters set."""
    from submitit.slurm.slurm import SlurmExecutor as Submitter

    class Anywhere(Submitter):
        """Can be built where Slurm is not installed, for the dry run."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    wanted = stage_resources(config, stage)
    executor = Anywhere(folder, max_num_timeout=wanted.max_timeouts, python=wanted.python)
    executor.update_parameters(**sbatch_parameters(config, stage, folder, dependency, code_folder))
    return executor


def sbatch_parameters(
    config: RunConfig, stage: str, folder: Path, dependency: str | None, code_folder: Path
) -> dict[str, Any]:
    """Return the parameters of one job as submitit names them.

    `folder`: of the submission. `code_folder`: the copy of the code that the job imports.
    """
    wanted = stage_resources(config, stage)
    parameters = {
        "job_name": f"{config.name}-{stage}",
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.tasks_per_node,
        "cpus_per_task": wanted.cpus_per_task,
        "mem": f"{wanted.mem_gb}GB" if wanted.mem_gb else None,
        "time": wanted.timeout_min,
        "partition": wanted.partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "constraint": wanted.constraint,
        "signal_delay_s": wanted.signal_delay_s,
        "dependency": dependency,
        "wckey": None,  # submitit's default is a key that most sites do not know
        "setup": _setup(wanted, stage, folder, code_folder),
        "srun_args": _srun_args(wanted),
        "additional_parameters": _options(wanted, stage, dependency, code_folder),
    }
    return {key: value for key, value in parameters.items() if value is not None or key == "wckey"}


def _setup(wanted: ClusterConfig, stage: str, folder: Path, code_folder: Path) -> list[str]:
    """Return the shell lines before the job's command."""
    python = wanted.python or shlex.quote(sys.executable)
    path = f"export PYTHONPATH={shlex.quote(str(code_folder))}${{PYTHONPATH:+:$PYTHONPATH}}"
    lines = [MARK_ATTEMPT, *wanted.setup, path]
    if stage != FINISH:
        trap = RESTART_TRAP.format(python=python, folder=shlex.quote(str(folder)), path=path)
        lines.insert(1, trap)  # a setup line may end the script
    return lines


def _srun_args(wanted: ClusterConfig) -> list[str]:
    return [
        "--kill-on-bad-exit=1",  # a rank that dies takes its peers along
        f"--cpus-per-task={wanted.cpus_per_task}",  # srun does not inherit it
        "--export=ALL",  # after `sbatch --export=NONE` srun would pass on nothing that the setup lines set
    ]


def _options(
    wanted: ClusterConfig, stage: str, dependency: str | None, code_folder: Path
) -> dict[str, str | bool]:
    """Return the options of sbatch that submitit has no parameter for, then the user's."""
    options: dict[str, str | bool] = {"requeue": True}
    options["chdir"] = str(code_folder)  # python -m puts the working directory before PYTHONPATH
    if dependency:  # otherwise a dependent of a failed job stays pending for ever
        options["kill-on-invalid-dep"] = "yes"
    gpus = gpu_request(wanted, stage)
    if gpus.count:
        typed = f"{gpus.type}:{gpus.count}" if gpus.type else str(gpus.count)
        if gpus.gres:
            options["gres"] = f"gpu:{typed}"
        else:
            options["gpus-per-node"] = typed
    for key, value in wanted.extra_sbatch.items():
        if value is None:
            options.pop(key, None)
        else:
            options[key] = True if value.lower() == "true" else value
    return options


def sbatch_script(
    config: RunConfig, stage: str, folder: Path, dependency: str | None, code_folder: Path, array_size: int
) -> str:
    """Return the script that `submitter` would pass to sbatch for an array of that size (1: a plain job)."""
    executor = submitter(config, stage, folder, dependency, code_folder)
    if array_size > 1:
        executor.parameters["map_count"] = array_size
    return executor._make_submission_file_text(executor._submitit_command_str, "")


# ---- the copy of the code


def code() -> dict[Path, bytes]:
    """Return everything that a job may import or read, by its path relative to the root of the code."""
    found = [ROOT / "launch.py"]
    for package in PACKAGES:
        found += [file for file in (ROOT / package).rglob("*") if file.suffix in KINDS]
    return {file.relative_to(ROOT): file.read_bytes() for file in sorted(found)}


def snapshot_folder(place: Callable[[str], Path], content: dict[Path, bytes]) -> Path:
    """Return the folder that `place` gives for the digest of the content."""
    digest = hashlib.sha256()
    for file, text in content.items():
        digest.update(f"{file}\0{len(text)}\0".encode() + text)
    return place(digest.hexdigest()[:12])


def snapshot(place: Callable[[str], Path]) -> Path:
    """Copy the code to its `snapshot_folder` unless it is there, and return that folder.

    The folder appears by one rename, so it is never half written.
    """
    content = code()
    folder = snapshot_folder(place, content)
    if folder.exists():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with naming(folder):
            for file, text in content.items():
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                (temporary / file).write_bytes(text)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another launch was quicker
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

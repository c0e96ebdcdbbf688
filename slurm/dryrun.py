"""What a launch would do, as text; needs neither Slurm nor torch and writes nothing."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from pipeline.config import load as configuration
from pipeline.rundir.layout import shared_dir
from pipeline.rundir.redact import redact
from slurm.chain import Chain, Run, Step, batches, stage_resources
from slurm.launcher import dependencies, make_executor, submission_folder
from slurm.snapshot import code, snapshot_folder


def describe(runs: list[Run], chain: Chain) -> str:
    """The resolved configurations and, in order, the jobs: for Slurm the very scripts that sbatch would get."""
    parts = [f"# {run.run_dir / 'config.yaml'}\n{redact(configuration.dump(run.config))}" for run in runs]
    parts += [f"# {note}\n" for note in chain.notes]
    if runs[0].config.cluster.executor == "slurm":
        parts += sbatch_scripts(chain)
    else:
        names = {step.output: step.name for step in chain.steps}
        for step in chain.steps:
            wanted, after = (
                stage_resources(step.run.config, step.stage),
                [names[output] for output in step.after],
            )
            parts.append(
                f"# job {step.name}, after: {', '.join(after) or 'nothing'}\n"
                f"# {wanted.executor}: {wanted.tasks_per_node} process(es) on this machine\n"
            )
    return "\n".join(parts)


def sbatch_scripts(chain: Chain) -> list[str]:
    """The scripts of all jobs and arrays, in the order of their submission, with names where ids will be."""
    parts, ids = [], dict[Path, str]()
    for group in batches(chain):
        first = group[0]
        dependency = dependencies(group, ids)
        names = [step.name for step in group]
        ids |= {
            step.output: f"<{first.name}>" + (f"_{i}" if len(group) > 1 else "")
            for i, step in enumerate(group)
        }
        parts.append(
            f"# {'array' if len(group) > 1 else 'job'} {', '.join(names)}\n{sbatch_script(group, dependency)}"
        )
    return parts


def sbatch_script(group: list[Step], dependency: str | None) -> str:
    """The script of one job or array, from the executor that would submit it."""
    from submitit.slurm.slurm import SlurmExecutor

    first = group[0]
    folder = submission_folder(first.run.run_dir, first.stage)
    where = snapshot_folder(shared_dir(first.run.config), code())
    with mock.patch.object(
        SlurmExecutor, "affinity", return_value=2
    ):  # it refuses to be built where srun is absent
        auto = make_executor(first.run.config, first.stage, folder, dependency, where)
    slurm = auto._executor
    assert isinstance(slurm, SlurmExecutor)
    if len(group) > 1:
        slurm.parameters["map_count"] = len(group)
    return slurm._make_submission_file_text(slurm._submitit_command_str, "")

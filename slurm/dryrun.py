"""What a launch would do, as text; needs neither Slurm nor torch and writes nothing."""

from __future__ import annotations

from unittest import mock

from pipeline import config as configuration
from slurm.chain import Chain, Run, Step, stage_resources
from slurm.launcher import make_executor, submission_folder


def describe(runs: list[Run], chain: Chain) -> str:
    """The resolved configurations and, in order, the jobs: for Slurm the very scripts that sbatch would get."""
    parts = [f"# {run.run_dir / 'config.yaml'}\n{configuration.dump(run.config)}" for run in runs]
    parts += [f"# {note}\n" for note in chain.notes]
    names = {step.output: step.name for step in chain.steps}
    for step in chain.steps:
        after = [names[output] for output in step.after]
        head = f"# job {step.name}, after: {', '.join(after) or 'nothing'}\n"
        if step.run.config.cluster.executor == "slurm":
            parts.append(head + sbatch_script(step, [f"<{name}>" for name in after]))
        else:
            wanted = stage_resources(step.run.config, step.stage)
            parts.append(head + f"# {wanted.executor}: {wanted.tasks_per_node} process(es) on this machine\n")
    return "\n".join(parts)


def sbatch_script(step: Step, dependencies: list[str]) -> str:
    """The script of one job, from the executor that would submit it; `dependencies` are job ids or what stands for them."""
    from submitit.slurm.slurm import SlurmExecutor

    with mock.patch.object(SlurmExecutor, "affinity", return_value=2):  # it refuses to be built where srun is absent
        auto = make_executor(step.run.config, step.stage, submission_folder(step), dependencies)
    slurm = auto._executor
    assert isinstance(slurm, SlurmExecutor)
    return slurm._make_submission_file_text(slurm._submitit_command_str, "")

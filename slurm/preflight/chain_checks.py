"""Check the stages of a launch together: their inputs, packages, GPUs, models and the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cvae.nets.shapes import require_fit, require_prior_fits
from pipeline.command_line import version_of
from pipeline.config.extras import missing_packages
from pipeline.config.schema import PHASES
from pipeline.errors import ConfigError
from pipeline.stages import STAGES
from pipeline.training.phases import evaluated_phase, require_sampling
from slurm.chain import SHARED, Chain, Run, Step, output_of
from slurm.executors import executor_named
from slurm.preflight.checks import Finding
from slurm.preflight.sizes import image_size
from slurm.resources import gpu_request, stage_resources


def inputs_are_made(chain: Chain) -> Iterator[Finding]:
    """The stages that a stage needs are part of the launch, or have left something to go on with."""
    planned = {*chain.queued, *(step.output for step in chain.steps)}
    for step in chain.steps:
        for needed in _needed(step):
            if output_of(step.run, needed) not in planned and not _begun(step.run, needed):
                yield Finding(
                    f"{step.run.config.name}: the stage {step.stage} needs the stage {needed}, which has not "
                    "run yet; name it too, or leave out --stages",
                    True,
                )


def _needed(step: Step) -> list[str]:
    """What a stage needs; an evaluation needs no phase behind the one that it evaluates."""
    after = STAGES[step.stage].after
    if step.stage != "eval":
        return list(after)
    later = PHASES[PHASES.index(evaluated_phase(step.run.config)) + 1 :]
    return [name for name in after if name not in later]


def _begun(run: Run, stage: str) -> bool:
    """Whether a stage is complete, is not wanted, or has left a checkpoint."""
    kind = STAGES[stage]
    if kind.complete(run.config, run.run_dir):
        return True
    return stage not in SHARED and kind.progress(run.config, run.run_dir) > 0


def torch_sees_gpus(chain: Chain) -> Iterator[Finding]:
    """PyTorch is not a build for the CPU, if a stage that starts here is to use GPUs.

    A stage with a Python of its own (`cluster.python`) may have another PyTorch. Its ranks look themselves.
    """
    version = version_of("torch")
    if not version.endswith("+cpu"):
        return
    for step in chain.steps:
        config = step.run.config
        wanted = executor_named(config.cluster.executor).resources(config, step.stage)
        if gpu_request(wanted, step.stage).count and not wanted.python:
            yield Finding(
                f"key 'cluster.gpus_per_node' for stage {step.stage}: got {wanted.gpus_per_node}, but "
                f"PyTorch {version} is a build for the CPU; install one for CUDA, "
                "or set cluster.gpus_per_node=0",
                True,
            )
            return  # it is the same for the other stages


def extras_are_installed(chain: Chain) -> Iterator[Finding]:
    """The optional packages that a stage needs are here.

    A stage with a Python of its own (`cluster.python`) may have others.
    """
    for step in chain.steps:
        if not stage_resources(step.run.config, step.stage).python:
            for text, fatal in missing_packages(step.run.config, step.stage):
                yield Finding(text, fatal)


def model_fits_together(chain: Chain) -> Iterator[Finding]:
    """The parts of each model that is to be trained fit each other and the images."""
    for step in chain.steps:
        if step.stage not in PHASES:
            continue
        config = step.run.config
        key = "model"
        try:
            if step.stage in ("refine", "steer"):  # with the nets of the stages before
                key = "refine.prior"
                prior = config.refine.prior
                require_prior_fits(replace(config.model, prior=prior), image_size(config))
            else:
                require_fit(config.model, image_size(config))
        except ValueError as error:
            yield Finding(f"key '{key}': {error}", True)


def evaluation_can_be_made(chain: Chain) -> Iterator[Finding]:
    """The prior that is to be evaluated can do what `eval` asks of it."""
    for step in chain.steps:
        if step.stage == "eval":
            try:
                require_sampling(step.run.config)
            except ConfigError as error:
                yield Finding(str(error), True)


OF_A_CHAIN = (inputs_are_made, extras_are_installed, model_fits_together, evaluation_can_be_made)

"""Which jobs a launch consists of and in which order; knows neither submitit nor torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.load import resources
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.config.suggest import suggest
from pipeline.errors import ConfigError
from pipeline.rundir import layout
from pipeline.stages import STAGES

SHARED = {"shard": layout.shards_dir, "classifier": layout.classifier_dir}  # outputs that several runs use
FINISH = "finish"  # the last job of a launch; no stage: it belongs to several runs
SINGLE_TASK = ("shard", FINISH)  # parallel by processes of its own, or not at all
SLURM_ONLY = ("partition", "account", "qos", "constraint", "setup", "extra_sbatch")


@dataclass(frozen=True)
class Run:
    """A resolved configuration and where it runs."""

    config: RunConfig
    run_dir: Path


@dataclass(frozen=True)
class Step:
    """One job: a stage of a run, or a part of it, after the steps whose outputs are `after`."""

    run: Run
    stage: str
    output: Path  # names the step: two runs with one output share one job
    after: tuple[Path, ...]
    part: tuple[int, int] | None = None  # (k, n)

    @property
    def name(self) -> str:
        """As the job is called on the cluster."""
        return f"{self.run.config.name}-{self.stage}" + (f"-part{self.part[0]}" if self.part else "")


@dataclass(frozen=True)
class Chain:
    """The jobs of a launch in an order in which each comes after what it needs, and a word on those left out."""

    steps: list[Step]
    notes: list[str]


def parse_stages(text: str | None) -> list[str]:
    """Names of 'shard,train' in the order of STAGES, all of them for None; raises ConfigError with the nearest name."""
    names = [name.strip() for name in text.split(",")] if text is not None else list(STAGES)
    for name in names:
        _require_stage(name, "--stages")
    return [name for name in STAGES if name in names]


def _require_stage(name: str, where: str) -> None:
    if name not in STAGES:
        hint = suggest(name, STAGES)
        raise ConfigError(f"{where}: unknown stage {name!r}, expected one of {', '.join(STAGES)}{hint}")


def stage_resources(config: RunConfig, stage: str) -> ClusterConfig:
    """What one stage asks for. Raises ConfigError that names the key that the executor cannot fulfil."""
    for name in config.cluster.stages:
        if name != FINISH:
            _require_stage(name, "key 'cluster.stages'")
    wanted = resources(config.cluster, stage)
    if stage in SINGLE_TASK:
        wanted = dataclasses.replace(wanted, nodes=1, tasks_per_node=1, gpus_per_node=0)
    for key in ("nodes", "tasks_per_node", "cpus_per_task", "timeout_min", "jobs"):
        if getattr(wanted, key) < 1:
            raise ConfigError(
                f"key 'cluster.{key}' for stage {stage}: got {getattr(wanted, key)}, expected at least 1"
            )
    if wanted.jobs > 1 and not (stage in STAGES and STAGES[stage].splits):
        raise ConfigError(
            f"key 'cluster.jobs' for stage {stage}: got {wanted.jobs}, but only the shard stage can be split"
        )
    if wanted.nodes > 1 and wanted.executor != "slurm":
        raise ConfigError(
            f"key 'cluster.nodes' for stage {stage}: got {wanted.nodes}, but executor '{wanted.executor}' has one node"
        )
    return wanted


def plan(runs: Iterable[Run], stages: list[str], explicit: bool) -> Chain:
    """Every requested stage of every run once; complete stages are left out unless the user named them (`explicit`)."""
    steps: dict[Path, Step] = {}
    notes: list[str] = []
    for run in runs:
        if ignored := _ignored(run.config.cluster):
            notes.append(
                f"{run.config.name}: executor '{run.config.cluster.executor}' makes no use of {', '.join(ignored)}"
            )
        outputs = {stage: _output(run, stage) for stage in STAGES}
        for stage in stages:
            stage_resources(run.config, stage)
            if outputs[stage] in steps:
                notes.append(f"{run.config.name}: {stage}: shared with {steps[outputs[stage]].name}")
            elif not explicit and STAGES[stage].complete(run.config, run.run_dir):
                notes.append(f"{run.config.name}: {stage}: complete, not submitted")
            else:
                parts = _parts(run, stage, outputs[stage])
                after = tuple(outputs[needed] for needed in STAGES[stage].after if outputs[needed] in steps)
                for step in [
                    *parts,
                    Step(run, stage, outputs[stage], after + tuple(part.output for part in parts)),
                ]:
                    steps[step.output] = step
    return Chain(list(steps.values()), notes)


def _parts(run: Run, stage: str, output: Path) -> list[Step]:
    """The array of jobs over a stage that is split. Not for toy faces: drawing them is the work, and one job does that."""
    n = stage_resources(run.config, stage).jobs
    if n == 1 or run.config.cluster.executor != "slurm" or not run.config.shard.source:
        return []
    return [Step(run, stage, output / f"part-{k}-of-{n}", (), (k, n)) for k in range(n)]


def batches(chain: Chain) -> list[list[Step]]:
    """The steps that go to Slurm as one job array: of one stage, with the same resources, waiting for the same kinds of steps."""
    groups: dict[object, list[Step]] = {}
    kinds = {step.output: (step.stage, step.part is not None) for step in chain.steps}
    for step in chain.steps:
        wanted = stage_resources(step.run.config, step.stage)
        asked = repr(dataclasses.replace(wanted, stages={}))
        waits = tuple(dict.fromkeys(kinds[output] for output in step.after))
        groups.setdefault((*kinds[step.output], asked, waits), []).append(step)
    return sorted(
        groups.values(), key=lambda group: (list(STAGES).index(group[0].stage), group[0].part is None)
    )


def _ignored(cluster: ClusterConfig) -> list[str]:
    given = [key for key in SLURM_ONLY if getattr(cluster, key)]
    return [] if cluster.executor == "slurm" else [f"cluster.{key}" for key in given]


def _output(run: Run, stage: str) -> Path:
    return SHARED[stage](run.config) if stage in SHARED else run.run_dir / stage

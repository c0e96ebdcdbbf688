"""Plan a launch: which jobs it needs, in which order, and what each of them asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.rundir import layout
from pipeline.stages import STAGES
from slurm.executors import executor_named
from slurm.queue import array_of
from slurm.resources import require_stage, stage_resources

SHARED = {"shard": layout.shards_dir, "classifier": layout.classifier_dir}  # outputs that several runs use


@dataclass(frozen=True)
class Run:
    """A resolved configuration and the directory of its run."""

    config: RunConfig
    run_dir: Path
    evaluates_only: bool = False  # the run's own configuration stays as it is


@dataclass(frozen=True)
class Step:
    """One job: a stage of a run, or a part of it. It starts after the steps whose outputs are in `after`."""

    run: Run
    stage: str
    output: Path  # identifies the step: two runs with the same output share one job
    after: tuple[Path, ...]
    part: tuple[int, int] | None = None  # (k, n)

    @property
    def name(self) -> str:
        """The job's name on the cluster."""
        suffix = f"-part{self.part[0]}" if self.part else ""
        return f"{self.run.config.name}-{self.stage}{suffix}"


@dataclass(frozen=True)
class Chain:
    """The jobs of a launch, each after the jobs it needs, and notes on the stages left out."""

    steps: list[Step]
    notes: list[str]
    queued: dict[Path, str] = field(default_factory=dict)  # output -> id of the job that makes it already
    finish: str = ""  # id of the queued job that finishes all runs of the launch


def parse_stages(text: str | None) -> list[str]:
    """Return the stages in 'shard,train' in the order of STAGES; None means all.

    Raises ConfigError with the nearest name for an unknown one.
    """
    if text is None:
        return list(STAGES)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        require_stage(name, "--stages")
    return [name for name in STAGES if name in names]


# ---- the plan


def plan(runs: Iterable[Run], stages: list[str]) -> Chain:
    """Plan every requested stage of every run once; complete ones are left out."""
    steps: dict[Path, Step] = {}
    notes: list[str] = []
    for run in runs:
        notes += _ignored(run.config)
        outputs = {stage: output_of(run, stage) for stage in STAGES}
        for stage in stages:
            output = outputs[stage]
            stage_resources(run.config, stage)
            if not STAGES[stage].wanted(run.config):
                continue
            if output in steps:
                notes.append(f"{run.config.name}: {stage}: shared with {steps[output].name}")
                continue
            if STAGES[stage].complete(run.config, run.run_dir):
                notes.append(f"{run.config.name}: {stage}: complete already")
                continue
            parts = _parts(run, stage, output)
            after = [outputs[needed] for needed in STAGES[stage].after if outputs[needed] in steps]
            after += [part.output for part in parts]
            for step in [*parts, Step(run, stage, output, tuple(after))]:
                steps[step.output] = step
    return Chain(list(steps.values()), notes)


def _ignored(config: RunConfig) -> list[str]:
    """A note on the keys that are set but that the executor does not use."""
    name = config.cluster.executor
    unused = executor_named(name).unused_keys
    given = [f"cluster.{key}" for key in unused if getattr(config.cluster, key)]
    return [f"{config.name}: executor '{name}' does not use {', '.join(given)}"] if given else []


def output_of(run: Run, stage: str) -> Path:
    """Return the folder that a stage of a run fills."""
    return SHARED[stage](run.config) if stage in SHARED else run.run_dir / stage


def _parts(run: Run, stage: str, output: Path) -> list[Step]:
    """The parts of a stage that is split. Toy faces are not: one job draws them fast enough."""
    n = stage_resources(run.config, stage).jobs
    if n == 1 or not run.config.shard.source or not executor_named(run.config.cluster.executor).job_arrays:
        return []
    return [Step(run, stage, part_of(output, k, n), (), (k, n)) for k in range(n)]


def part_of(output: Path, k: int, n: int) -> Path:
    """Return what identifies the k-th of n parts of a stage that fills `output`."""
    return output / f"part-{k}-of-{n}"


# ---- job arrays and their dependencies


def batches(chain: Chain) -> list[list[Step]]:
    """Group the steps into job arrays: same stage, same resources, same kinds of steps to wait for."""
    kinds = {step.output: (step.stage, step.part is not None) for step in chain.steps}
    groups: dict[object, list[Step]] = {}
    for step in chain.steps:
        asked = repr(stage_resources(step.run.config, step.stage))
        waits = tuple(dict.fromkeys(kinds.get(output) for output in step.after))
        groups.setdefault((*kinds[step.output], asked, waits), []).append(step)

    def position(group: list[Step]) -> tuple[int, bool]:
        return list(STAGES).index(group[0].stage), group[0].part is None

    return sorted(groups.values(), key=position)


def dependencies(group: list[Step], ids: dict[Path, str], earlier: Collection[str] = ()) -> str | None:
    """Return sbatch's --dependency for a job array, or None if it waits for nothing.

    `ids` maps outputs to the ids (12 or 12_3) of the jobs submitted so far. If element i needs
    exactly element i of another array, it waits for that one alone (aftercorr). Otherwise the
    whole array waits for every job that any element needs (afterok).
    `earlier`: ids that an earlier launch submitted; its arrays may have other tasks, which may have failed.
    """
    needed = [[ids[output] for output in step.after] for step in group]
    arrays = dict.fromkeys(array_of(job) for jobs in needed for job in jobs)
    incomplete = {array_of(job) for job in earlier}
    whole: list[str] = []
    pairwise: list[str] = []
    for array in arrays:
        size = sum(array_of(job) == array for job in ids.values())
        used = [[job for job in jobs if array_of(job) == array] for jobs in needed]
        one_to_one = [[f"{array}_{i}"] for i in range(len(group))]
        if used == one_to_one and 1 < len(group) == size:
            pairwise.append(f"aftercorr:{array}")
            continue
        distinct = list(dict.fromkeys(job for jobs in used for job in jobs))
        known = len(distinct) == size and array not in incomplete
        whole += [array] if known else distinct
    clauses = pairwise
    if whole:
        clauses = [":".join(["afterok", *whole]), *pairwise]
    return ",".join(clauses) or None

"""The stages of the chain. A new stage is a file in this folder and its line in STAGES. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import PHASES, RunConfig
from pipeline.rundir import layout
from pipeline.training.phases import finished, start_of

if TYPE_CHECKING:
    from pipeline.runtime.context import Context


def _shards_complete(config: RunConfig, run_dir: Path) -> bool:
    return (layout.shards_dir(config) / "manifest.json").exists()


def _shards_made(config: RunConfig, run_dir: Path) -> int:
    return len(list(layout.shards_dir(config).glob("*.tar")))


def _phase_complete(phase: str) -> Callable[[RunConfig, Path], bool]:
    def complete(config: RunConfig, run_dir: Path) -> bool:
        images = getattr(config, phase).images
        if not images:
            return True  # the configuration leaves this phase out
        file = layout.train_dir(run_dir, phase) / "done.json"
        if not file.exists():
            return False
        done = json.loads(file.read_text())
        start = start_of(phase, config)
        if start:  # a later phase is complete only after the same training as now
            unchanged = done.get("start") == finished(start, run_dir)
            if not unchanged or not _phase_complete(start)(config, run_dir):
                return False
        return bool(done["images"] >= images)

    return complete


def _phase_step(phase: str) -> Callable[[RunConfig, Path], int]:
    def step(config: RunConfig, run_dir: Path) -> int:
        files = layout.checkpoints_dir(run_dir, phase).glob("step_*.json")
        steps = [file.stem.removeprefix("step_") for file in files]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    return step


def _classifier_complete(config: RunConfig, run_dir: Path) -> bool:
    return (layout.classifier_dir(config) / "metrics.json").exists()


def _never_complete(config: RunConfig, run_dir: Path) -> bool:
    return False  # each evaluation gets a new number


def _always_wanted(config: RunConfig) -> bool:
    return True


def _phase_wanted(phase: str) -> Callable[[RunConfig], bool]:
    def wanted(config: RunConfig) -> bool:
        return bool(getattr(config, phase).images)

    return wanted


def _no_progress(config: RunConfig, run_dir: Path) -> int:
    return 0  # an interrupted stage starts again from nothing


@dataclass(frozen=True)
class Stage:
    """One job of the chain: `run(config, context)` of `module` on every rank, after the stages `after`."""

    name: str
    module: str
    after: tuple[str, ...]
    # Whether the stage's outputs are there and belong to this configuration.
    complete: Callable[[RunConfig, Path], bool]
    # A number that grows as work is saved, so that a restart would not start from nothing.
    progress: Callable[[RunConfig, Path], int] = _no_progress
    # Whether the configuration asks for this stage at all.
    wanted: Callable[[RunConfig], bool] = _always_wanted
    # Whether several jobs may do parts of it at once, before the whole stage completes it.
    splits: bool = False

    def run(self, config: RunConfig, context: Context) -> None:
        """Run the stage in this process (all ranks call it)."""
        import_module(self.module).run(config, context)


def _phase(name: str, after: tuple[str, ...]) -> Stage:
    module = f"pipeline.stages.{name}"
    return Stage(name, module, after, _phase_complete(name), _phase_step(name), _phase_wanted(name))


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("shard", "pipeline.stages.shard", (), _shards_complete, _shards_made, splits=True),
        _phase("train", ("shard",)),
        _phase("tune", ("train",)),
        _phase("refine", ("train", "tune")),
        _phase("steer", ("refine",)),
        Stage("classifier", "pipeline.stages.classifier", ("shard",), _classifier_complete),
        Stage(
            "eval",
            "pipeline.stages.eval",
            (*PHASES, "classifier"),
            _never_complete,
        ),
    )
}

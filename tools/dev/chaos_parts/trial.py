"""One trial: train, strike at a seeded moment, restart with the same command, compare with the undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import load as configuration
from pipeline.config.schema import RunConfig
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from tools.dev.chaos_parts import faults
from tools.dev.chaos_parts.faults import FAULTS, Fault, WrongEnd, require
from tools.dev.chaos_parts.ranks import Group
from tools.dev.chaos_parts.server import Server

STEPS, INTERVAL, BATCH = 24, 4, 8
CLOCKS = ("images_per_s", "data_wait_share")  # series that are not deterministic
DISK_MB = 4
TINY = [
    "toy.n=80", "shard.size=16", "shard.samples_per_shard=16", "model.net.channels=[8,16]", "model.z_dim=8", "model.conditioner.width=8",
    "model.prior.hidden=16", "model.prior.flow.layers=2", "model.prior.flow.hidden=16", f"train.batch_size={BATCH}",
    f"train.images={STEPS * BATCH}", "train.threads=1", "train.timeout_s=60", "train.stall_s=30", "train.log_interval=1",
    "train.val_interval=8", f"train.checkpoint_interval={INTERVAL}", "train.keep_checkpoints=3", "optim.warmup_images=16",
    "train.kl_warmup_images=64", "tracking.enabled=false",
]  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run of one world size leaves."""

    digest: str  # sha256 of the final weights, averages and moments
    metrics: list[Any]
    samples: dict[int, list[int]]  # of each step, in rank order


@dataclass(frozen=True)
class Outcome:
    """What became of a trial; `error` is empty where every promise was kept."""

    kind: str
    world: int
    seed: int
    error: str
    lost: int  # steps done before the fault that had to be done again
    in_flight: bool  # a checkpoint was on its way to the disk at that moment
    refusals: int  # restarts that were refused with the right error
    seconds: float


@dataclass
class Trial:
    """One run directory and the fault that it meets."""

    kind: str
    world: int
    seed: int
    folder: Path
    runs_dir: Path
    limit_s: float
    server: Server | None = None
    mounted: bool = False
    hurt: Path | None = None
    attempts: list[Group] = field(default_factory=list)

    @cached_property
    def random(self) -> random.Random:
        """Decides everything in this trial."""
        return random.Random(f"{self.kind}/{self.world}/{self.seed}")

    @cached_property
    def rank(self) -> int:
        """The rank that is struck."""
        return self.random.randrange(self.world)

    @property
    def fault(self) -> Fault:
        """What strikes."""
        return FAULTS[self.kind]

    @property
    def run_dir(self) -> Path:
        """Of the run."""
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        """Of the run."""
        return layout.checkpoints_dir(self.run_dir)

    @property
    def shards(self) -> Path:
        """A copy that belongs to this trial."""
        return layout.shards_dir(self.config)

    @property
    def group(self) -> Group:
        """The newest attempt."""
        return self.attempts[-1]

    @cached_property
    def config(self) -> RunConfig:
        """Of the run; its shards lie in the trial's own folder."""
        tracking = [f"tracking.uri={self.server.uri}", "tracking.enabled=true"] if self.server else []
        return configuration.load([], [*TINY, f"runs_dir={self.folder}", *self.fault.overrides, *tracking])

    def durable_steps(self) -> list[int]:
        """Steps of the checkpoints whose JSON is there."""
        return [int(file.stem[5:]) for file in self.checkpoints.glob("step_*.json")]

    def other_group(self) -> Group:
        """A second launch of the same run."""
        return Group(self.run_dir, self.folder / "second", self.world)

    def prepare(self) -> None:
        """Folder, shards, configuration."""
        self.run_dir.mkdir(parents=True)
        self.mounted = self.fault.mount and faults.mount(self.run_dir, DISK_MB)
        shutil.copytree(
            layout.shards_dir(configuration.load([], [*TINY, f"runs_dir={self.runs_dir}"])), self.shards
        )
        (self.run_dir / "config.yaml").write_text(configuration.dump(self.config))

    def start(self) -> Group:
        """The same command again."""
        self.attempts.append(Group(self.run_dir, self.folder / f"attempt{len(self.attempts)}", self.world))
        return self.group

    def run(self) -> tuple[int, bool, int]:
        """Strike and restart until it is finished: steps lost, whether a checkpoint was on its way, refused restarts."""
        fault, first = self.fault, self.start()
        earliest, latest = fault.earliest, STEPS - fault.latest_from_end
        first.wait_for_step(self.random.randint(earliest, latest), self.limit_s)
        time.sleep(self.random.uniform(0, 0.03))  # somewhere in or after that step
        fault.strike(self)
        fault.expect(self, first.wait(self.limit_s))
        reached, durable, refusals = max(first.done, default=-1) + 1, max(self.durable_steps(), default=0), 0
        if fault.between:
            fault.between(self)
        if fault.refused:
            require(self.start().wait(self.limit_s) == [2] * self.world, "the restart was not refused", self)
            require(
                fault.refused in self.group.text() and str(self.hurt) in self.group.text(),
                "not the right error",
                self,
            )
            refusals = 1
        fault.mend(self)
        if first.codes[0] == 0:
            return 0, False, refusals
        codes = self.start().wait(self.limit_s)
        require(codes == [0] * self.world, f"exit codes of the restart {codes}", self)
        lost, in_flight = reached - min(self.group.done, default=reached), first.saving > durable
        allowed = fault.intervals * INTERVAL
        require(lost <= allowed, f"{lost} steps lost of {reached}, at most {allowed} are promised", self)
        return lost, in_flight, refusals

    def result(self) -> Reference:
        """What the run has left, its consumed samples put together from all attempts: a step counts once all ranks have begun it."""
        final = self.checkpoints / f"step_{STEPS:08d}.json"
        records = read_metrics(layout.train_dir(self.run_dir) / "metrics.jsonl")
        metrics = [
            (r["step"], {k: v for k, v in r["values"].items() if not k.endswith(CLOCKS)}) for r in records
        ]
        samples: dict[int, list[int]] = {}
        for attempt in self.attempts:
            for step, parts in attempt.begun.items():
                if len(parts) == self.world:
                    samples[step] = sum((parts[rank] for rank in range(self.world)), [])
        return Reference(json.loads(final.read_text())["sha256"], metrics, dict(sorted(samples.items())))

    def close(self) -> None:
        """Nothing is left of it: no process, no mount."""
        for attempt in self.attempts:
            for rank in range(attempt.world):
                if rank not in attempt.codes:
                    attempt.signal(rank, signal.SIGCONT)
            attempt.kill()
        if self.mounted:
            faults.unmount(self.run_dir)


def undisturbed(world: int, folder: Path, runs_dir: Path, limit_s: float) -> Reference:
    """The run that nothing strikes."""
    trial = Trial("SIGKILL to a rank", world, 0, folder, runs_dir, limit_s)
    trial.prepare()
    try:
        codes = trial.start().wait(limit_s)
        require(codes == [0] * world, f"exit codes of the undisturbed run {codes}", trial)
        return trial.result()
    finally:
        trial.close()


def compare(found: Reference, wanted: Reference, trial: Trial) -> None:
    """Raise WrongEnd where anything that the run has left differs from the undisturbed one."""
    require(found.samples == wanted.samples, "other samples were trained on", trial)
    require(found.metrics == wanted.metrics, "a metric series differs", trial)
    require(found.digest == wanted.digest, "the final weights differ", trial)


def run_trial(trial: Trial, wanted: Reference) -> Outcome:
    """One trial from beginning to end; the folder stays where it failed."""
    start, error, found = time.monotonic(), "", (0, False, 0)
    try:
        trial.prepare()
        found = trial.run()
        compare(trial.result(), wanted, trial)
        if trial.server:
            trial.server.require_complete(trial)
    except (WrongEnd, RuntimeError, OSError) as reason:
        error = str(reason) or type(reason).__name__
    finally:
        trial.close()
    if not error:
        shutil.rmtree(trial.folder)
    return Outcome(trial.kind, trial.world, trial.seed, error, *found, seconds=time.monotonic() - start)

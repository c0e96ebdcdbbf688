"""One trial: train, strike at a seeded moment, restart, compare with the undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
import traceback
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
from tools.dev.chaos_parts.processes import end_descendants
from tools.dev.chaos_parts.ranks import Group
from tools.dev.chaos_parts.server import Server

STEPS = 24
INTERVAL = 4  # train.max_lost_steps, steps
BATCH = 8
CLOCKS = ("images_per_s", "data_wait_share")  # metrics that measure time and so differ from run to run
DISK_MB = 4
GRACE_S = 5.0  # what a process of a finished trial may take to end
TINY = [
    "toy.n=80", "shard.size=16", "shard.samples_per_shard=16",
    "model.net.channels=[8,16]", "model.z_dim=8", "model.conditioner.width=8",
    "model.prior.hidden=16", "model.prior.flow.layers=2", "model.prior.flow.hidden=16",
    f"train.batch_size={BATCH}", f"train.images={STEPS * BATCH}", "train.threads=1",
    "train.log_interval=1", "train.val_interval=8",
    f"train.max_lost_steps={INTERVAL}", "train.keep_checkpoints=3",
    "optim.warmup_images=16", "train.kl_warmup_images=64", "tracking.enabled=false",
]  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The results of an undisturbed run of one world size."""

    digest: str  # sha256 of the final weights, averages and moments
    metrics: list[Any]
    samples: dict[int, list[int]]  # of each step, in rank order


@dataclass(frozen=True)
class Outcome:
    """The result of a trial; `error` is empty if every promise was kept."""

    kind: str
    world: int
    seed: int
    error: str  # its first line names the broken promise, the rest is the end of the logs
    lost: int  # steps done before the fault that had to be done again
    in_flight: bool  # a checkpoint was being written at that moment
    refusals: int  # restarts that were refused with the right error
    seconds: float
    folder: str  # kept if the trial failed


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
    hurt: Path | None = None  # the damaged shard
    attempts: list[Group] = field(default_factory=list)
    second: Group | None = None  # a second launch of the same run, beside the first

    @cached_property
    def random(self) -> random.Random:
        """The generator of all random decisions in this trial."""
        return random.Random(f"{self.kind}/{self.world}/{self.seed}")

    @cached_property
    def rank(self) -> int:
        """The rank that is struck."""
        return self.random.randrange(self.world)

    @property
    def fault(self) -> Fault:
        """The fault that strikes."""
        return FAULTS[self.kind]

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        """The run's folder of checkpoints."""
        return layout.checkpoints_dir(self.run_dir)

    @property
    def shards(self) -> Path:
        """This trial's own copy of the shards."""
        return layout.shards_dir(self.config)

    @property
    def group(self) -> Group:
        """The ranks of the newest attempt."""
        return self.attempts[-1]

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration; its shards lie in the trial's own folder.

        Ranks wait for each other as long as the campaign is patient: on a busy machine a rank that gets
        no processor for a minute breaks no promise.
        """
        timeout_s = round(max(60, self.limit_s / 2))
        patience = [f"train.timeout_s={timeout_s}", f"train.stall_s={timeout_s // 2}"]
        overrides = [*TINY, *patience, f"runs_dir={self.folder}", *self.fault.overrides]
        if self.server:
            overrides += [f"tracking.uri={self.server.uri}", "tracking.enabled=true"]
        return configuration.load([], overrides)

    def durable_steps(self) -> list[int]:
        """Return the steps of the checkpoints whose JSON is there."""
        return [int(file.stem[5:]) for file in self.checkpoints.glob("step_*.json")]

    def launch_again(self) -> Group:
        """Launch the same run a second time, beside the first."""
        self.second = Group(self.run_dir, self.folder / "second", self.world)
        return self.second

    def prepare(self) -> None:
        """Make folder, shards and configuration."""
        self.run_dir.mkdir(parents=True)
        self.mounted = self.fault.mount and faults.mount(self.run_dir, DISK_MB)
        shared = configuration.load([], [*TINY, f"runs_dir={self.runs_dir}"])
        shutil.copytree(layout.shards_dir(shared), self.shards)
        (self.run_dir / "config.yaml").write_text(configuration.dump(self.config))

    def start(self) -> Group:
        """Start the training: the same command in every attempt."""
        logs = self.folder / f"attempt{len(self.attempts)}"
        self.attempts.append(Group(self.run_dir, logs, self.world))
        return self.group

    def run(self) -> tuple[int, bool, int]:
        """Strike, then restart until training finishes.

        Returns the steps lost, whether a checkpoint was being written, and the number of refused
        restarts. Raises WrongEnd if a promise is broken.
        """
        fault = self.fault
        first = self.start()
        strike_at = self.random.randint(fault.earliest, STEPS - fault.latest_from_end)
        first.wait_for_step(strike_at, self.limit_s)
        time.sleep(self.random.uniform(0, 0.03))  # somewhere in that step or right after it
        fault.strike(self)
        fault.expect(self, first.wait(self.limit_s))
        reached = max(first.done, default=-1) + 1
        in_flight = first.saving > max(self.durable_steps(), default=0)
        if fault.between:
            fault.between(self)
        refusals = 0
        if fault.refused:
            self._require_refusal()
            refusals = 1
        fault.mend(self)
        if first.codes[0] == 0:  # training finished despite the fault
            return 0, False, refusals
        codes = self.start().wait(self.limit_s)
        require(codes == [0] * self.world, f"exit codes of the restart {codes}", self)
        lost = reached - min(self.group.done, default=reached)
        allowed = fault.intervals * INTERVAL
        require(lost <= allowed, f"{lost} steps lost of {reached}, at most {allowed} are promised", self)
        return lost, in_flight, refusals

    def _require_refusal(self) -> None:
        """Start once more and require that every rank refuses with the fault's error."""
        codes = self.start().wait(self.limit_s)
        require(codes == [2] * self.world, "the restart was not refused", self)
        text = self.group.text()
        is_named = self.fault.refused in text and str(self.hurt) in text
        require(is_named, "the restart was refused with the wrong error", self)

    def result(self) -> Reference:
        """Return what the run has left.

        A step's samples count once all ranks have begun the step.
        """
        final = self.checkpoints / f"step_{STEPS:08d}.json"
        metrics = []
        for record in read_metrics(layout.train_dir(self.run_dir) / "metrics.jsonl"):
            values = {k: v for k, v in record["values"].items() if not k.endswith(CLOCKS)}
            metrics.append((record["step"], values))
        samples: dict[int, list[int]] = {}
        for attempt in self.attempts:
            for step, parts in attempt.begun.items():
                if len(parts) == self.world:
                    samples[step] = sum((parts[rank] for rank in range(self.world)), [])
        digest = json.loads(final.read_text())["sha256"]
        return Reference(digest, metrics, dict(sorted(samples.items())))

    def close(self) -> list[str]:
        """End every process of the trial and unmount its disk.

        Returns the processes that nobody knew of and that outlived the ranks; there should be none.
        """
        groups = [*self.attempts, self.second] if self.second else self.attempts
        for group in groups:
            for rank in range(group.world):
                if rank not in group.codes:
                    group.signal(rank, signal.SIGCONT)
            group.kill()
        survivors = end_descendants(GRACE_S)
        if self.mounted:
            faults.unmount(self.run_dir)
            self.mounted = False
        return survivors


def undisturbed(world: int, folder: Path, runs_dir: Path, limit_s: float) -> Reference:
    """Train without a fault on `world` ranks."""
    trial = Trial("SIGKILL to a rank", world, 0, folder, runs_dir, limit_s)
    trial.prepare()
    try:
        codes = trial.start().wait(limit_s)
        require(codes == [0] * world, f"exit codes of the undisturbed run {codes}", trial)
        return trial.result()
    finally:
        trial.group.kill()


def compare(found: Reference, wanted: Reference, trial: Trial) -> None:
    """Raise WrongEnd if anything that the run has left differs from the undisturbed run."""
    require(found.samples == wanted.samples, "other samples were trained on", trial)
    require(found.metrics == wanted.metrics, "a metric series differs", trial)
    require(found.digest == wanted.digest, "the final weights differ", trial)


def run_trial(trial: Trial, wanted: Reference) -> Outcome:
    """Run one trial from beginning to end.

    Its folder is removed after all its processes ended, and kept if it failed.
    """
    start = time.monotonic()
    error = ""
    found = (0, False, 0)
    try:
        if trial.server:
            trial.server.start()
        trial.prepare()
        found = trial.run()
        compare(trial.result(), wanted, trial)
        if trial.server:
            trial.server.require_complete(trial)
    except (WrongEnd, RuntimeError) as reason:
        error = str(reason)
    except Exception:
        error = f"the trial itself failed\n{traceback.format_exc()}"
    if survivors := trial.close():
        error = error or f"processes outlived the training: {', '.join(survivors)}"
    if not error:
        shutil.rmtree(trial.folder)
    seconds = time.monotonic() - start
    return Outcome(trial.kind, trial.world, trial.seed, error, *found, seconds, str(trial.folder))

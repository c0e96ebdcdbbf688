"""Stages that need no torch, for jobs of a real local executor; imported by name in the job's processes."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.rundir.files import write_json
from pipeline.runtime.preempt import StopFlag, Stopped
from slurm.job import StageJob

SEEN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class StandIn(StageJob):
    """Notes in <run_dir>/rank<r>.<attempt>.json what it sees, then does `act`."""

    def run(self, stop: StopFlag) -> None:
        """One attempt of one rank."""
        run_dir, rank = Path(self.run_dir), int(os.environ["RANK"])
        attempt = len(list(run_dir.glob(f"rank{rank}.*.json")))
        sees = {name: os.environ.get(name) for name in SEEN}
        write_json(
            run_dir / f"rank{rank}.{attempt}.json",
            {**sees, "pid": os.getpid(), "ctrl_c": signal.SIGINT not in signal.pthread_sigmask(0, [])},
        )
        self.act(stop, rank, attempt)

    def act(self, stop: StopFlag, rank: int, attempt: int) -> None:
        """Finish at once."""


@dataclass(frozen=True)
class StopsOnce(StandIn):
    """Works until it is asked to stop, saves its step, and finishes from there in the next attempt."""

    def act(self, stop: StopFlag, rank: int, attempt: int) -> None:
        """Stop in attempt 0; afterwards say where it goes on."""
        saved = Path(self.run_dir) / f"step.{rank}"
        if attempt == 0 and self.stage == "train":
            wait_for(lambda: stop.requested)
            saved.write_text("39")
            raise Stopped
        if self.stage == "train":
            (Path(self.run_dir) / f"resumed.{rank}").write_text(saved.read_text())


@dataclass(frozen=True)
class PressesCtrlC(StandIn):
    """Rank 0 interrupts the launcher once all ranks are there, then waits to be stopped."""

    def act(self, stop: StopFlag, rank: int, attempt: int) -> None:
        """Wait for the stop request."""
        wait_for(lambda: len(list(Path(self.run_dir).glob("rank*.json"))) == int(os.environ["WORLD_SIZE"]))
        if rank == 0:
            os.kill(int(os.environ["TEST_LAUNCHER"]), signal.SIGINT)
        wait_for(lambda: stop.requested)
        raise Stopped


@dataclass(frozen=True)
class BadData(StandIn):
    """Rank 1 finds a damaged file, rank 0 then loses its peer."""

    def act(self, stop: StopFlag, rank: int, attempt: int) -> None:
        """Fail on every rank."""
        if rank == 1:
            raise DataError("shards/00003.tar: damaged; run the shard stage again")
        wait_for(lambda: printed(Path(self.run_dir), "shards/00003.tar: damaged"))
        raise RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:4242")


@dataclass(frozen=True)
class Bug(StandIn):
    """Rank 1 has a bug, rank 0 then loses its peer."""

    def act(self, stop: StopFlag, rank: int, attempt: int) -> None:
        """Fail on every rank."""
        if rank == 1:
            raise ZeroDivisionError("the very bug")
        wait_for(lambda: printed(Path(self.run_dir), "the very bug"))
        raise RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:4242")


@dataclass(frozen=True)
class Killed(StandIn):
    """Every rank is killed, as by the kernel when memory runs out."""

    def act(self, stop: StopFlag, rank: int, attempt: int) -> None:
        """Die without a word."""
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KilledOnce(StandIn):
    """The last rank of the first attempt is killed; the others wait for it, as they would in a collective."""

    def act(self, stop: StopFlag, rank: int, attempt: int) -> None:
        """Die in attempt 0."""
        if attempt == 0 and self.stage == "train":
            wait_for(
                lambda: len(list(Path(self.run_dir).glob("rank*.0.json"))) == int(os.environ["WORLD_SIZE"])
            )
            if rank == int(os.environ["WORLD_SIZE"]) - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for(lambda: False)


def wait_for(condition, limit_s: float = 30.0) -> None:
    """Return once `condition()` holds; raises TimeoutError."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("condition never held")
        time.sleep(0.01)


def printed(run_dir: Path, text: str) -> bool:
    """Whether rank 1 has printed `text`: a peer that is lost earlier would let its error be cut off."""
    return any(text in log.read_text(errors="replace") for log in run_dir.rglob("*_1_log.err"))


def seen(run_dir: Path, rank: int, attempt: int = 0) -> dict:
    """The notes of one rank."""
    return json.loads((run_dir / f"rank{rank}.{attempt}.json").read_text())

"""Ranks of a train stage as forked processes: torch is imported once, so a trial starts in milliseconds."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run import run_stage
from pipeline.runtime.ports import free_port
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import train
from pipeline.training.saver import Saver

CAP_DAC_OVERRIDE = 1
LIVE_INTERVAL_S = 0.3  # the tracking thread of a training of seconds


def obey_permissions() -> None:
    """A process of root gives up the capability to write where no permission bit allows it, so that read-only means read-only."""
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header, data = (
        (ctypes.c_uint32 * 2)(version, 0),
        (ctypes.c_uint32 * 6)(),
    )  # effective, permitted, inheritable; low words, then high
    if libc.capget(header, data) == 0:
        data[0] &= ~(1 << CAP_DAC_OVERRIDE)
        libc.capset(header, data)


def fork(work: object, log: Path) -> int:
    """Run the callable `work` in a child with its output in `log`; exits with what it returns, as `pipeline.run` would."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        obey_permissions()
        code = work()  # type: ignore[operator]
    except Stopped:
        code = 128 + signal.SIGTERM
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        code = 2
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code or 0)


def _rank(run_dir: Path, rank: int, world: int, port: int, events: int) -> None:
    """One rank: reports each step that it begins with which samples (b), has done (d), and each checkpoint begun (c).

    Samples are told before the step: a rank killed right behind it has trained on them, and others may have saved that.
    """
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}
    train_step, save = train.Trainer.train_step, Saver.save

    def tell(*words: object) -> None:
        os.write(events, (" ".join(map(str, words)) + "\n").encode())  # shorter than PIPE_BUF: never mixed

    def told_step(self, batch):
        tell("b", rank, self.step, *batch.indices.tolist())
        record = train_step(self, batch)
        tell("d", rank, record.step - 1)
        return record

    def told_save(self, step, tensors, meta):
        tell("c", rank, step)
        save(self, step, tensors, meta)

    train.Trainer.train_step, Saver.save = told_step, told_save  # type: ignore[method-assign, assignment]
    train.LiveSync = partial(train.LiveSync, interval_s=LIVE_INTERVAL_S)  # type: ignore[misc, assignment]
    with StopFlag() as stop:
        run_stage(run_dir, "train", stop)


@dataclass
class Group:
    """The ranks of one attempt, and what they have told so far."""

    run_dir: Path
    logs: Path  # folder of this attempt's output
    world: int
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    begun: dict[int, dict[int, list[int]]] = field(default_factory=dict)  # step -> rank -> samples
    done: set[int] = field(default_factory=set)  # steps that any rank has done
    saving: int = 0  # newest step whose checkpoint was begun

    def __post_init__(self) -> None:
        """Fork the ranks."""
        self.logs.mkdir(parents=True)
        port, (self._events, write) = free_port(), os.pipe()
        self._rest = b""
        for rank in range(self.world):
            self.pids.append(
                fork(
                    partial(_rank, self.run_dir, rank, self.world, port, write), self.logs / f"rank{rank}.log"
                )
            )
        os.close(write)

    def listen(self, timeout_s: float) -> bool:
        """Take in what the ranks tell, for at most `timeout_s` until something comes; False once all have closed their ends."""
        if not select.select([self._events], [], [], timeout_s)[0]:
            return True
        content = os.read(self._events, 1 << 16)
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            kind, rank, step, *samples = line.decode().split()
            if kind == "b":
                self.begun.setdefault(int(step), {})[int(rank)] = [int(s) for s in samples]
            elif kind == "c":
                self.saving = int(step)
            else:
                self.done.add(int(step))
        return bool(content)

    def wait_for_step(self, step: int, limit_s: float) -> None:
        """Until a rank has begun `step`; RuntimeError where none does."""
        give_up = time.monotonic() + limit_s
        while max(self.begun, default=-1) < step:
            if not self.listen(0.1) or time.monotonic() > give_up:
                raise RuntimeError(
                    f"step {step} was not begun (now {max(self.begun, default=-1)}): {self.tail()}"
                )

    def wait(self, limit_s: float) -> list[int]:
        """Exit codes (negative: a signal's number) of all ranks; RuntimeError, after killing, where one is still there after `limit_s`."""
        give_up = time.monotonic() + limit_s
        while len(self.codes) < self.world:
            self.listen(0.02)
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[rank] = os.waitstatus_to_exitcode(ended[1])
            if time.monotonic() > give_up:
                left = [rank for rank in range(self.world) if rank not in self.codes]
                self.kill()
                raise RuntimeError(f"ranks {left} were still there after {limit_s:.0f} s: {self.tail()}")
        while self.listen(0.0):
            pass
        return [self.codes[rank] for rank in range(self.world)]

    def kill(self) -> None:
        """SIGKILL to every rank that is still there, and wait for it."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        while self.listen(0.0):
            pass

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that has not been waited for."""
        os.kill(self.pids[rank], number)

    def text(self) -> str:
        """All that the ranks have printed."""
        return "\n".join(log.read_text(errors="replace") for log in sorted(self.logs.glob("*.log")))

    def tail(self) -> str:
        """The end of what each rank has printed."""
        return "\n".join(
            f"{log.name}: {log.read_text(errors='replace')[-1500:]}"
            for log in sorted(self.logs.glob("*.log"))
        )

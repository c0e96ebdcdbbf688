"""The ranks of a train stage as forked processes, which start without importing torch again."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch._dynamo  # noqa: F401  # DDP imports it: once here, rather than in every forked rank

from pipeline.errors import UserError
from pipeline.run import run_stage
from pipeline.runtime.ports import reserve_port
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.training import loop
from pipeline.training.checkpoints.saver import Saver
from tools.dev.chaos_parts.processes import die_with_parent

CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION = 0x20080522
LIVE_INTERVAL_S = 0.3  # a trial lasts seconds, so its tracking thread must not wait for long


def obey_permissions() -> None:
    """Give up root's right to write anywhere, so that a read-only folder really is one."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, then high words
    if libc.capget(header, sets) == 0:
        sets[0] &= ~(1 << CAP_DAC_OVERRIDE)
        libc.capset(header, sets)


def fork(work: Callable[[], int | None], log: Path) -> int:
    """Run `work` in a child process that writes to `log`, and return its process number.

    The child exits with the value of `work`, or with the code that `pipeline.run` would give. It
    dies with its parent.
    """
    pid = os.fork()
    if pid:
        return pid
    code: int | None = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        obey_permissions()
        die_with_parent()
        code = work()
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
    """Train as one rank, and report steps begun with their samples (b), steps done (d), saves (c).

    The samples are reported before the step. A rank that is killed right after the step has trained
    on them, and another rank may already have saved the result.
    """
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}
    train_step = loop.Trainer.train_step
    save = Saver.save

    def tell(*words: object) -> None:
        line = " ".join(map(str, words)) + "\n"
        os.write(events, line.encode())  # shorter than PIPE_BUF, so lines of two ranks never mix

    def told_step(self, batch):
        tell("b", rank, self.step, *batch.indices.tolist())
        record = train_step(self, batch)
        tell("d", rank, record.step - 1)
        return record

    def told_save(self, step, tensors, meta):
        tell("c", rank, step)
        save(self, step, tensors, meta)

    loop.Trainer.train_step = told_step  # type: ignore[method-assign]
    Saver.save = told_save  # type: ignore[method-assign]
    loop.LiveSync = partial(loop.LiveSync, interval_s=LIVE_INTERVAL_S)  # type: ignore[misc, assignment]
    with StopFlag() as stop:
        run_stage(run_dir, "train", stop)


@dataclass
class Group:
    """The ranks of one attempt, and what they have reported so far."""

    run_dir: Path
    logs: Path  # the folder of this attempt's output
    world: int
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    begun: dict[int, dict[int, list[int]]] = field(default_factory=dict)  # step -> rank -> samples
    done: set[int] = field(default_factory=set)  # steps that any rank has finished
    saving: int = 0  # newest step whose checkpoint was begun
    heard: float = field(default_factory=time.monotonic)  # when a rank last reported anything

    def __post_init__(self) -> None:
        """Fork the ranks."""
        self.logs.mkdir(parents=True)
        self._port = reserve_port()  # another trial could take a port that is only known to be free
        port = int(self._port.getsockname()[1])
        self._events, write = os.pipe()
        self._rest = b""
        for rank in range(self.world):
            work = partial(_rank, self.run_dir, rank, self.world, port, write)
            self.pids.append(fork(work, self.logs / f"rank{rank}.log"))
        os.close(write)

    def listen(self, timeout_s: float) -> bool:
        """Read what the ranks report.

        Wait for at most `timeout_s`. Returns False once all ranks have ended.
        """
        if not select.select([self._events], [], [], timeout_s)[0]:
            return True
        content = os.read(self._events, 1 << 16)
        *lines, self._rest = (self._rest + content).split(b"\n")
        if lines:
            self.heard = time.monotonic()
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
        """Wait until a rank has begun `step`.

        Raises RuntimeError if the ranks end, or report nothing for `limit_s`, before that.
        """
        while max(self.begun, default=-1) < step:
            if not self.listen(0.1) or time.monotonic() > self.heard + limit_s:
                newest = max(self.begun, default=-1)
                raise RuntimeError(f"step {step} was not begun (newest: {newest}): {self.tail()}")

    def wait(self, limit_s: float) -> list[int]:
        """Return the exit codes of all ranks; a negative code is the number of a signal.

        Raises RuntimeError, after killing the ranks, if they report nothing for `limit_s` and one still runs.
        """
        begin = time.monotonic()
        while len(self.codes) < self.world:
            self.listen(0.02)
            for rank, pid in enumerate(self.pids):
                if rank in self.codes:
                    continue
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > max(begin, self.heard) + limit_s:
                left = [rank for rank in range(self.world) if rank not in self.codes]
                said = self.tail()  # before the kill, whose first victim the others would report as lost
                self.kill()
                raise RuntimeError(
                    f"ranks {left} still run, but reported nothing for {limit_s:.0f} s: {said}"
                )
        self._finish()
        return [self.codes[rank] for rank in range(self.world)]

    def kill(self) -> None:
        """Send SIGKILL to every rank that still runs, and wait for it. A stopped rank dies too."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._finish()

    def _finish(self) -> None:
        """Read the last reports, and give the port up."""
        while self.listen(0.0):
            pass
        self._port.close()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that has not been waited for."""
        os.kill(self.pids[rank], number)

    def text(self) -> str:
        """Return everything that the ranks have printed."""
        return "\n".join(log.read_text(errors="replace") for log in sorted(self.logs.glob("*.log")))

    def tail(self) -> str:
        """Return the end of what each rank has printed."""
        ends = []
        for log in sorted(self.logs.glob("*.log")):
            ends.append(f"{log.name}: {log.read_text(errors='replace')[-1500:]}")
        return "\n".join(ends)

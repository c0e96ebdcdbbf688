"""Find the rank that stands still: every rank reports its step, and a rank that falls silent ends the job.

Ranks report through the process group's key-value store, from threads. A rank that waits in a collective
still reports; one that is frozen (SIGSTOP, a dead node) does not. The process leaves by os._exit, because its
main thread sits in a collective that no exception reaches. The scheduler then restarts the job.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.rundir.files import write_json
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.owner import start_ticks

EXIT_CODE = 75  # EX_TEMPFAIL: worth another try
WARM_UP_STEPS = 2  # the first steps compile and choose kernels
PAUSED, DONE = "paused", "done"


class Watchdog:
    """Watches from the third step on, except inside `paused`.

    Validation may take as long as it likes; the process group's own timeout bounds it.
    """

    def __init__(
        self,
        ranks: Ranks,
        limit_s: float,
        folder: Path,
        log: logging.Logger,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """Make a watchdog (all ranks) that writes `folder`/stall.json; with `limit_s` 0 it does nothing."""
        self.ranks = ranks
        self.limit_s = limit_s
        self.folder = folder
        self.log = log
        self.leave = leave
        self.state = PAUSED
        self.since = time.monotonic()  # of the state
        self.steps = 0
        self._end = threading.Event()
        self._period = min(5.0, limit_s / 5)
        self._store: Any = None  # the process group's; a single rank has none
        self._peers: dict[int, list] = {}
        self._heard: dict[int, tuple[str, float]] = {}  # rank -> its last report, and when that was new
        self._answered = time.monotonic()  # when the store last answered
        self._threads = []
        for work in (self._report_and_listen, self._watch):
            self._threads.append(threading.Thread(target=work, name="watchdog", daemon=True))

    def __enter__(self) -> Watchdog:
        """Begin to watch (all ranks)."""
        if not self.limit_s:
            return self
        if self.ranks.world_size > 1:
            self._meet()
        for thread in self._threads:
            thread.start()
        return self

    def _meet(self) -> None:
        """Tell the other ranks which process this is, and learn who they are (all ranks)."""
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=max(1.0, self.limit_s / 2)))
        identity = [socket.gethostname(), os.getpid(), start_ticks(os.getpid())]
        self._store.set(f"watchdog/who/{self.ranks.rank}", json.dumps(identity))
        self._store.set(f"watchdog/beat/{self.ranks.rank}", f"0 {PAUSED}")
        self.ranks.barrier()
        self._answered = time.monotonic()
        for rank in range(self.ranks.world_size):
            self._peers[rank] = json.loads(self._store.get(f"watchdog/who/{rank}"))
            self._heard[rank] = ("", self._answered)

    def __exit__(self, *_: object) -> None:
        """Stop watching; this rank may leave before the others."""
        self._end.set()
        for thread in self._threads if self.limit_s else ():
            thread.join(1.0)  # it may wait for a store whose host is gone

    def at(self, step: int) -> None:
        """Note that this rank begins `step` (main thread); after the warm-up collectives time out sooner."""
        self.steps += 1
        if self.steps == WARM_UP_STEPS + 1 and self.limit_s:
            self.ranks.set_timeout(2 * self.limit_s)
        if self.steps > WARM_UP_STEPS:
            self.state = str(step)
            self.since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch what follows, until the next step: validation, waiting for a checkpoint."""
        self.state = PAUSED
        yield

    # Two threads: one talks to the store, whose host may be the frozen one, and the other decides.

    def _report_and_listen(self) -> None:
        """Report this rank's state and hear the others, again and again.

        If the store's host is frozen, this blocks for ever.
        """
        if self._store is None:
            return
        names = [f"watchdog/beat/{rank}" for rank in range(self.ranks.world_size)]
        count = 0
        try:
            while not self._end.wait(self._period):
                count += 1
                self._store.set(names[self.ranks.rank], f"{count} {self.state}")
                states = [content.decode() for content in self._store.multi_get(names)]
                now = time.monotonic()  # of the answer: a busy host may let the store wait for long
                for rank, state in enumerate(states):
                    if state != self._heard[rank][0]:
                        self._heard[rank] = (state, now)
                self._answered = now
            self._store.set(names[self.ranks.rank], f"{count} {DONE}")
        except RuntimeError:  # torch.distributed raises nothing else when the store is gone
            pass

    def _watch(self) -> None:
        awake = time.monotonic()
        while not self._end.wait(self._period):
            now = time.monotonic()
            if now - awake > self.limit_s / 2:
                self._forgive(now - awake)  # this process stood still itself: the scheduler suspended the job
            awake = now
            silent = self._silent(now)
            if not silent and self.state != PAUSED and now - self.since > self.limit_s:
                silent = self._behind()
            if silent and not self._end.is_set():
                return self._bring_down(silent)

    def _silent(self, now: float) -> list[int]:
        """Return the ranks that have not reported for `limit_s`."""
        if self._store is None:
            return []
        if now - self._answered > self.limit_s:
            return [0] if self.ranks.rank else []  # rank 0's host keeps the store
        silent = []
        for rank, (value, at) in self._heard.items():
            if now - at > self.limit_s and not value.endswith(DONE):
                silent.append(rank)
        return silent

    def _forgive(self, gap_s: float) -> None:
        """Take the seconds in which this process could not listen out of every count."""
        self.since += gap_s
        self._answered += gap_s
        self._heard = {rank: (value, at + gap_s) for rank, (value, at) in self._heard.items()}

    def _behind(self) -> list[int]:
        """Return the ranks in the earliest step; none while a rank validates, saves or has left.

        All ranks are returned if all are in one step.
        """
        states = {rank: value.partition(" ")[2] for rank, (value, _) in self._heard.items()}
        states[self.ranks.rank] = self.state
        if not all(state.isdigit() for state in states.values()):
            return []
        steps = {rank: int(state) for rank, state in states.items()}
        least = min(steps.values())
        return [rank for rank, step in steps.items() if step == least]

    def _bring_down(self, silent: list[int]) -> None:
        """Report the silent ranks, kill those on this host, and leave."""
        names = ", ".join(self._describe(rank) for rank in silent)
        message = (
            f"step {self.state}: no answer for {self.limit_s:g} s from rank {names}; "
            "leaving, so that the job can be restarted"
        )
        reporter = threading.Thread(target=self._report, args=(silent, message), daemon=True)
        reporter.start()  # in a thread, because the disk itself may hang
        reporter.join(5.0)
        for rank in silent:
            if rank != self.ranks.rank and rank in self._peers:
                host, pid, started = self._peers[rank]
                if host == socket.gethostname() and started is not None and start_ticks(pid) == started:
                    os.kill(pid, signal.SIGKILL)  # a frozen process cannot leave by itself
        self.leave(EXIT_CODE)

    def _describe(self, rank: int) -> str:
        if rank not in self._peers:
            return str(rank)
        host, pid, _ = self._peers[rank]
        return f"{rank} (process {pid} on {host})"

    def _report(self, silent: list[int], message: str) -> None:
        self.log.error("%s", message)
        note = {
            "step": self.state,
            "ranks": silent,
            "limit_s": self.limit_s,
            "noticed_by": self.ranks.rank,
            "message": message,
        }
        write_json(self.folder / "stall.json", note)

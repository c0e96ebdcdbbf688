"""Finds the rank that stands still: each rank says in the group's store which step it is in; one that falls silent ends the job.

By threads of their own: a rank that waits in a collective still speaks, one that is frozen (SIGSTOP, a dead node) does not.
The process leaves by os._exit: its main thread sits in a collective that no exception reaches. The scheduler restarts the job.
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
WARM_UP_STEPS = 2  # the first ones compile and choose kernels
PAUSED, DONE = "paused", "done"


class Watchdog:
    """Watches from the third step on, and not inside `paused`: validation takes as long as it takes, and the group's timeout bounds it."""

    def __init__(
        self,
        ranks: Ranks,
        limit_s: float,
        folder: Path,
        log: logging.Logger,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """All ranks; `folder` gets stall.json. `limit_s` 0: does nothing."""
        self.ranks, self.limit_s, self.folder, self.log, self.leave = ranks, limit_s, folder, log, leave
        self.state, self.since, self.steps = PAUSED, time.monotonic(), 0
        self._end = threading.Event()
        self._period = min(5.0, limit_s / 5)
        self._peers: dict[int, list] = {}
        self._heard: dict[int, tuple[str, float]] = {}  # rank -> what it said last, and when that was new
        self._answered = time.monotonic()  # the store
        self._threads = [
            threading.Thread(target=work, name="watchdog", daemon=True) for work in (self._talk, self._watch)
        ]

    def __enter__(self) -> Watchdog:
        """Begin to watch (all ranks)."""
        if self.limit_s:
            if self.ranks.world_size > 1:
                store: Any = dist.distributed_c10d._get_default_store()
                self._store = store.clone()
                self._store.set_timeout(timedelta(seconds=max(1.0, self.limit_s / 2)))
                identity = [socket.gethostname(), os.getpid(), start_ticks(os.getpid())]
                self._store.set(f"watchdog/who/{self.ranks.rank}", json.dumps(identity))
                self._store.set(f"watchdog/beat/{self.ranks.rank}", f"0 {PAUSED}")
                names = [f"watchdog/who/{rank}" for rank in range(self.ranks.world_size)]
                self.ranks.barrier()
                self._peers = {rank: json.loads(self._store.get(name)) for rank, name in enumerate(names)}
                self._answered = time.monotonic()
                self._heard = {rank: ("", self._answered) for rank in range(self.ranks.world_size)}
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching; this rank may leave before the others."""
        self._end.set()
        for thread in self._threads if self.limit_s else ():
            thread.join(1.0)  # it may wait for a store whose host is gone

    def at(self, step: int) -> None:
        """This rank begins `step` (main thread); after warm-up collectives get a shorter timeout."""
        self.steps += 1
        if self.steps == WARM_UP_STEPS + 1 and self.limit_s:
            self.ranks.set_timeout(2 * self.limit_s)
        if self.steps > WARM_UP_STEPS:
            self.state, self.since = str(step), time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What may take long: validation, waiting for a checkpoint."""
        self.state = PAUSED
        yield

    # ---- the threads: one talks to the store, whose host may be the one that froze; the other draws the conclusions

    def _talk(self) -> None:
        """Say where this rank is and hear the others, again and again; blocks for ever where the store's host is frozen."""
        if self._store is None:
            return
        names = [f"watchdog/beat/{rank}" for rank in range(self.ranks.world_size)]
        count = 0
        try:
            while not self._end.wait(self._period):
                count += 1
                self._store.set(names[self.ranks.rank], f"{count} {self.state}")
                now = time.monotonic()
                for rank, content in enumerate(self._store.multi_get(names)):
                    if (value := content.decode()) != self._heard[rank][0]:
                        self._heard[rank] = (value, now)
                self._answered = time.monotonic()
            self._store.set(names[self.ranks.rank], f"{count} {DONE}")
        except RuntimeError:  # all of torch.distributed's errors: the store is gone
            pass

    def _watch(self) -> None:
        awake = time.monotonic()
        while not self._end.wait(self._period):
            now = time.monotonic()
            if (
                now - awake > self.limit_s / 2
            ):  # this process stood still itself, as in a job that the scheduler suspends
                self._forgive(now - awake)
            awake = now
            if self._store is None:
                silent = []
            elif now - self._answered > self.limit_s:
                silent = [0] if self.ranks.rank else []  # rank 0's host keeps the store
            else:
                silent = [
                    r
                    for r, (value, at) in self._heard.items()
                    if now - at > self.limit_s and not value.endswith(DONE)
                ]
            if not silent and self.state != PAUSED and now - self.since > self.limit_s:
                here = {self.ranks.rank: (f"0 {self.state}", now)}
                silent = self._behind(
                    {rank: value.partition(" ")[2] for rank, (value, _) in (self._heard | here).items()}
                )
            if silent and not self._end.is_set():
                return self._bring_down(silent)

    def _forgive(self, gap_s: float) -> None:
        """Take the seconds in which this process could not listen out of every count."""
        self.since += gap_s
        self._answered += gap_s
        self._heard = {rank: (value, at + gap_s) for rank, (value, at) in self._heard.items()}

    def _behind(self, states: dict[int, str]) -> list[int]:
        """Ranks in an earlier step than this one; none while a rank validates or saves; all where all are in one step."""
        if PAUSED in states.values() or not all(state.isdigit() for state in states.values()):
            return []
        steps = {rank: int(state) for rank, state in states.items()}
        least = min(steps.values())
        return [rank for rank, step in steps.items() if step == least]

    def _bring_down(self, silent: list[int]) -> None:
        names = ", ".join(
            f"{r} (process {self._peers[r][1]} on {self._peers[r][0]})" if r in self._peers else str(r)
            for r in silent
        )
        message = f"step {self.state}: no answer for {self.limit_s:g} s from rank {names}; leaving, so that the job can be restarted"
        reporter = threading.Thread(
            target=self._report, args=(silent, message), daemon=True
        )  # the disk itself may hang
        reporter.start()
        reporter.join(5.0)
        for rank in silent:
            if rank != self.ranks.rank and rank in self._peers:
                host, pid, started = self._peers[rank]
                if host == socket.gethostname() and started is not None and start_ticks(pid) == started:
                    os.kill(pid, signal.SIGKILL)  # a frozen process cannot leave by itself
        self.leave(EXIT_CODE)

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

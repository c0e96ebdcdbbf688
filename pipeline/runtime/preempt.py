"""Stop requests from the scheduler: a signal sets a flag, and the stage acts on it at a step boundary.

Worker processes leave these signals to the process that started them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import FrameType
from typing import Any

log = logging.getLogger("cvae.workers")

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Raised by a stage on every rank after it was asked to stop and has saved its state."""


class StopFlag:
    """`requested` turns true when a stop signal arrives on this rank; other ranks may not know yet.

    The flag listens between `install` and `uninstall`, or inside a `with`. `received` keeps the signals.
    """

    def __init__(self) -> None:
        """Make a flag that does not listen yet."""
        self.requested = False
        self.received: set[int] = set()
        self.previous: dict[int, Any] = {}  # the handlers that were there before, e.g. submitit's

    def install(self, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> StopFlag:
        """Listen to `signals`; main thread only. A hang-up that is ignored stays ignored (nohup)."""
        for number in signals:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self.previous[number] = signal.signal(number, self._handle)
        return self

    def uninstall(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def __enter__(self) -> StopFlag:
        """Install."""
        return self.install()

    def __exit__(self, *_: object) -> None:
        """Uninstall."""
        self.uninstall()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self.received.add(signum)


def worker_pool(processes: int, start: Callable[[], None]) -> ProcessPoolExecutor | None:
    """Return a pool of new processes. Each calls `start` first, which must call `serve_parent`.

    None if one process is enough, or with a warning if the machine has no place for the pool's semaphores:
    they lie in /dev/shm, which some sites fill, close or leave out.
    """
    if processes <= 1:
        return None
    spawn = multiprocessing.get_context("spawn")  # fork is not safe beside threads (torch, log, tracking)
    try:
        # Not a multiprocessing.Pool, which waits for ever if one of its workers is killed.
        return ProcessPoolExecutor(processes, spawn, start)
    except (OSError, ImportError, NotImplementedError) as error:
        log.warning("/dev/shm: cannot be used (%s); one process does the work of %d", error, processes)
        return None


def serve_parent() -> None:
    """Make this worker process leave stop signals to its parent, and not outlive it.

    A scheduler, or a terminal that goes away, sends its signal to every process of a job.
    """
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

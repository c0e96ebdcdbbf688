"""The context of a stage: everything it gets besides its configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.rundir.lock import locked
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag, Stopped

WAITING = "another process holds the lock"


@dataclass(frozen=True)
class Context:
    """One rank of one stage: where it writes, its peers, and whether it was asked to stop."""

    run_dir: Path
    ranks: Ranks
    stop: StopFlag
    log: logging.Logger  # ranks other than 0 log warnings only
    part: tuple[int, int] | None = None  # (k, n): only part k of n of a stage that can be split
    job: str = ""  # the scheduler's name of this job, for people to read


@contextmanager
def alone(lock: Path, context: Context) -> Iterator[None]:
    """Hold the file `lock` against other jobs (all ranks call it; rank 0 holds it).

    After each try rank 0 tells the others to wait on, since no collective may take as long as another job.
    Raises Stopped on every rank if a stop is requested during the wait.
    """
    ranks = context.ranks
    if not ranks.is_main:
        answer = WAITING
        while answer == WAITING:
            answer = ranks.text_from_main("")
        if answer:
            raise Stopped(answer)
        yield
        return

    def keep_waiting() -> bool:
        if context.stop.requested:
            raise Stopped(ranks.text_from_main(f"asked to stop while another process held {lock}"))
        return bool(ranks.text_from_main(WAITING))

    with locked(lock, keep_waiting=keep_waiting):
        ranks.text_from_main("")
        yield

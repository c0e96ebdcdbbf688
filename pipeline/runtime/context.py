"""The context of a stage: everything it gets besides its configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag


@dataclass(frozen=True)
class Context:
    """One rank of one stage: where it writes, its peers, and whether it was asked to stop."""

    run_dir: Path
    ranks: Ranks
    stop: StopFlag
    log: logging.Logger  # ranks other than 0 log warnings only
    part: tuple[int, int] | None = None  # (k, n): only part k of n of a stage that can be split
    job: str = ""  # the scheduler's name of this job, for people to read

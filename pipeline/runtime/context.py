"""What a stage is given beside its configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag


@dataclass(frozen=True)
class Context:
    """One rank of one stage: where it writes, who its peers are, and whether it was asked to stop."""

    run_dir: Path
    ranks: Ranks
    stop: StopFlag
    log: logging.Logger  # ranks other than 0 only pass warnings
    part: tuple[int, int] | None = None  # (k, n): only the k-th of n parts of a stage that can be split
    job: str = ""  # the scheduler's name of this job, for people to read

"""Log lines and progress: a bar on a terminal, one line now and then in a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm


def stage_logger(stage: str, run_dir: Path, rank: int, part: tuple[int, int] | None = None) -> logging.Logger:
    """Logger of one stage on one rank: rank 0 says everything, the others only warnings; also in logs/<stage>/."""
    logger = logging.getLogger(f"cvae.{stage}")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    folder = run_dir / "logs" / stage
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank{rank}.log" if part is None else f"part{part[0]}.log"
    form = logging.Formatter(f"%(asctime)s {stage}[{rank}] %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr), logging.FileHandler(folder / name)]
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)
    return logger


def progress(
    items: Iterable, total: int, what: str, logger: logging.Logger, every_s: float = 15.0
) -> Iterator:
    """Pass `items` on, with a bar (rate, ETA) on a terminal, else a log line every `every_s` seconds."""
    if sys.stderr.isatty():
        yield from tqdm(
            items, total=total, desc=what, leave=False, disable=not logger.isEnabledFor(logging.INFO)
        )
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every_s and done < total:
            last, rate = now, done / (now - start)
            logger.info("%s %d/%d, %.3g/s, %.0f s left", what, done, total, rate, (total - done) / rate)

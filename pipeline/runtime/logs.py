"""Log lines, and progress: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

ROOT_LOGGER = "cvae"  # every module's logger is a child of it, so its messages reach the running stage's log


@contextmanager
def stage_log(
    stage: str, run_dir: Path, rank: int, part: tuple[int, int] | None = None
) -> Iterator[logging.Logger]:
    """Send every logger of this project to stderr and to logs/<stage>/ inside the `with` block.

    Rank 0 logs everything, the other ranks only warnings. `part`: the (k, n) that gets a file of its own.
    """
    folder = run_dir / "logs" / stage
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank{rank}.log" if part is None else f"part{part[0]}.log"
    line = logging.Formatter(f"%(asctime)s {stage}[{rank}] %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr), logging.FileHandler(folder / name)]
    root = logging.getLogger(ROOT_LOGGER)
    level, propagates = root.level, root.propagate
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False  # a library that configures Python's own root logger must not double the lines
    for handler in handlers:
        handler.setFormatter(line)
        root.addHandler(handler)
    try:
        yield root.getChild(stage)
    finally:
        root.setLevel(level)
        root.propagate = propagates
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def progress(
    items: Iterable, total: int, what: str, logger: logging.Logger, every_s: float = 15.0
) -> Iterator:
    """Pass `items` on, with a bar (rate, ETA) on a terminal, else a log line every `every_s` seconds."""
    if sys.stderr.isatty():
        quiet = not logger.isEnabledFor(logging.INFO)
        yield from tqdm(items, total=total, desc=what, leave=False, disable=quiet)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every_s and done < total:
            last = now
            rate = done / (now - start)
            logger.info("%s %d/%d, %.3g/s, %.0f s left", what, done, total, rate, (total - done) / rate)

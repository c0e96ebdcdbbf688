"""Log lines, and progress: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

LINE_EVERY_S = 15.0  # between two lines about the progress of a long stage
LINE = re.compile(r"[\d:]{8} \w+\[\d+\] (?P<level>[DIWEC]) (?P<text>.*)")  # a line of a log, as written below
PROGRESS = re.compile(r"[^:]+ \d+/\d+, .*")  # its text, if it tells how far a stage is: "step 4/37, ..."
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
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr), LogFile(folder / name)]
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
            with suppress(OSError):  # of a full disk; the stage's own error names it
                handler.close()


class LogFile(logging.FileHandler):
    """A log on a disk that may become full: lines are then lost, and nothing else is said about them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print a traceback, as Python does, unless the disk has refused the line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Pace:
    """Says when the next line about progress is due: soon after the start, and later now and then."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether a line is due, and count it as written."""
        now = time.monotonic()
        wait_s = min(LINE_EVERY_S, max(2.0, (now - self._start) / 5))
        if now - self._last < wait_s:
            return False
        self._last = now
        return True


def progress(items: Iterable, total: int, what: str, logger: logging.Logger) -> Iterator:
    """Pass `items` on, with a bar (rate, ETA) on a terminal, else a log line now and then."""
    if sys.stderr.isatty():
        quiet = not logger.isEnabledFor(logging.INFO)
        yield from tqdm(items, total=total, desc=what, leave=False, disable=quiet)
        return
    start = time.monotonic()
    pace = Pace()
    for done, item in enumerate(items, 1):
        yield item
        if done < total and pace.due():
            rate = done / (time.monotonic() - start)
            logger.info("%s %d/%d, %.3g/s, %.0f s left", what, done, total, rate, (total - done) / rate)

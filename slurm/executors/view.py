"""What a person sees of a stage that runs: how far it is, warnings and errors. The log has the rest."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from pipeline.reporting.text import duration
from pipeline.runtime.logs import LINE, PROGRESS
from slurm.status import LogTail

LEVELS = {"W": "warning", "E": "error", "C": "error"}
SECONDS_LEFT = re.compile(r"(\d+) s left")
WIDTH = 100  # columns of the line that moves


# The terminal may be gone while ranks still run: then output is lost, but the launcher goes on.


def tell(text: str) -> None:
    """Print a line, if there is still somebody to read it."""
    with suppress(OSError):
        print(text, flush=True)


def tell_error(text: str) -> None:
    """Print a line to stderr, if there is still somebody to read it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class StageView:
    """Follows a stage's log: one line that moves on a terminal, elsewhere a line now and then."""

    def __init__(self, log: Path, label: str) -> None:
        """`label`: begins every line, for example "[2/6] sigma_cvae train"."""
        self._log = LogTail(log)
        self._label = label
        self._rest = ""  # the beginning of a line that is still being written
        self._start = time.monotonic()
        self._moves = sys.stdout.isatty()
        self._say("starting")

    def show(self) -> None:
        """Show what is new in the log."""
        *lines, self._rest = (self._rest + self._log.new()).split("\n")
        for line in lines:
            found = LINE.fullmatch(line)
            if found and found["level"] in LEVELS:
                self._clear()
                tell(f"{self._label}: {LEVELS[found['level']]}: {found['text']}")
            elif found and PROGRESS.fullmatch(found["text"]):
                self._say(SECONDS_LEFT.sub(_readable, found["text"]))

    def end(self) -> None:
        """Say that the stage is complete, and how long it took."""
        self._clear()
        tell(f"{self._label}: done in {duration(time.monotonic() - self._start)}")

    def _say(self, text: str) -> None:
        line = f"{self._label}: {text}"
        if not self._moves:
            tell(line)
            return
        with suppress(OSError):
            print(f"\r{line[:WIDTH]:{WIDTH}}", end="", flush=True)

    def _clear(self) -> None:
        if self._moves:
            with suppress(OSError):
                print(f"\r{'':{WIDTH}}\r", end="", flush=True)


def _readable(seconds: re.Match[str]) -> str:
    return f"{duration(float(seconds[1]))} left"

"""The tracker: the program that shows the numbers of many runs side by side.

metrics.jsonl and the other files of a run directory are the truth. A tracker is fed from them, as often as
one likes: it sends what its store lacks, and nothing twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError
from pipeline.rundir import record


class TrackingError(UserError):
    """The tracker's store could not be reached or refused to be written."""


class Tracker(ABC):
    """Sends one run directory to a store. To add a tracker, write a class and its line in TRACKERS."""

    live = False  # whether the store may be fed while the run trains, by a thread of rank 0

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self.run_dir = run_dir
        self.config = config

    def push(self) -> None:
        """Make the store hold everything that the run directory holds.

        Files come last: a store that takes numbers but no files still shows the run and its state.
        Raises TrackingError if the store cannot be reached or refuses.
        """
        with self.session():
            self.start()
            self.params()
            self.metrics()
            self.end(record.status(self.run_dir, self.config))
            self.files()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold what one pass needs, such as a lock, and turn the store's errors into TrackingError."""
        yield

    @abstractmethod
    def start(self) -> None:
        """Find the run in the store, or create it there."""

    @abstractmethod
    def params(self) -> None:
        """Send the configuration and the jobs."""

    @abstractmethod
    def metrics(self) -> None:
        """Send the numbers of training and of the evaluations."""

    @abstractmethod
    def end(self, status: str) -> None:
        """Send the run's state: RUNNING, FINISHED, FAILED or KILLED."""

    @abstractmethod
    def files(self) -> None:
        """Send the configuration file, the report and the pictures."""

    @abstractmethod
    def send_table(self, name: str, files: list[Path]) -> None:
        """Keep `files`, the tables of a sweep, in the store under `name`; the same name replaces them."""

    def require_answer(self) -> None:  # noqa: B027
        """Raise TrackingError if the store is a server that does not answer; this costs little."""

    def problem(self) -> str:
        """Ask the store whether it is ready; return what is wrong with the key `tracking.uri`, or ""."""
        return ""

    @property
    @abstractmethod
    def address(self) -> str:
        """Return where the numbers go, without credentials, for people to read."""

    @property
    def viewer(self) -> str:
        """Return the command or address that shows the numbers, or ""."""
        return ""


class NullTracker(Tracker):
    """Sends nothing; used if `tracking.enabled` is false."""

    def push(self) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Do nothing."""

    def params(self) -> None:
        """Do nothing."""

    def metrics(self) -> None:
        """Do nothing."""

    def end(self, status: str) -> None:
        """Do nothing."""

    def files(self) -> None:
        """Do nothing."""

    def send_table(self, name: str, files: list[Path]) -> None:
        """Do nothing."""

    @property
    def address(self) -> str:
        """Say that nothing is sent."""
        return "nowhere (tracking.enabled is false)"

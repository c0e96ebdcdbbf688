"""Feed the tracker: while training runs, after each stage, and by hand. It never slows or stops a run."""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.rundir.record import run_config
from pipeline.rundir.redact import redact
from pipeline.tracking.base import NullTracker, Tracker

LOG = logging.getLogger("cvae.tracking")
LONGEST_WAIT = 16  # intervals between two tries during an outage

# tracking.name: the module and the class. Modules are imported when they are used, because mlflow is slow.
TRACKERS = {
    "mlflow": ("pipeline.tracking.mlflow.tracker", "MlflowTracker"),
}


def make_tracker(run_dir: Path, config: RunConfig) -> Tracker:
    """Return the tracker of a run: the class that `tracking.name` names, or one that sends nothing."""
    kind: type[Tracker] = NullTracker
    if config.tracking.enabled:
        module, name = TRACKERS[config.tracking.name]
        kind = getattr(import_module(module), name)
    return kind(run_dir.absolute(), config)


def tracker_of(run_dir: Path) -> Tracker:
    """Return the tracker of a run directory. Raises ConfigError if `run_dir` is not one."""
    return make_tracker(run_dir, run_config(run_dir))


def sync_run(run_dir: Path, log: logging.Logger = LOG) -> None:
    """Make the store hold everything that `run_dir` holds (one process, any number of times).

    A store that is absent, locked or refuses is one warning with the command that sends the rest later.
    """
    try:
        tracker_of(run_dir).push()
    except Exception as error:
        log.warning("%s", redact(str(error)))


@contextmanager
def sync_beside(log: logging.Logger = LOG) -> Iterator[Callable[[Path], object]]:
    """Give a `sync_run` that works beside the caller; the end of the block waits for all runs given to it.

    After an error it waits only for what has begun and for the run given last, and names the others. A
    Ctrl-C ends the wait.
    """
    pool = ThreadPoolExecutor(1, "tracking")
    given: list[tuple[Path, Future[None]]] = []
    try:
        yield lambda run_dir: given.append((run_dir, pool.submit(sync_run, run_dir, log)))
    except BaseException:
        for _, push in given[:-1]:
            push.cancel()
        raise
    finally:
        try:
            pool.shutdown()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            _name_unsent(dict(given), log)


def _name_unsent(newest: dict[Path, Future[None]], log: logging.Logger) -> None:
    """Warn with the command that sends the runs whose newest push has not ended, if a job of them began."""
    unsent = [run_dir for run_dir, push in newest.items() if push.cancelled() or not push.done()]
    begun = [str(run_dir) for run_dir in unsent if (run_dir / "jobs.json").exists()]
    if begun:
        log.warning("not sent yet; `python tools/sync_mlflow.py %s` sends the rest", shlex.join(begun))


def sync_sweep(config: RunConfig, name: str, files: list[Path], log: logging.Logger = LOG) -> None:
    """Keep the tables of a sweep in the store. If the store refuses, that is a warning; the files stay."""
    try:
        make_tracker(Path(config.runs_dir), config).send_table(f"sweep {name}", files)
    except Exception as error:
        log.warning("%s", redact(str(error)))


class LiveSync:
    """A thread of rank 0 that feeds the store while training runs.

    It does nothing unless the tracker is `live`: jobs on several nodes must never open one SQLite file.
    """

    def __init__(self, run_dir: Path, interval_s: float = 20.0, log: logging.Logger = LOG) -> None:
        """Start to feed `run_dir` every `interval_s` seconds."""
        self._tracker = tracker_of(run_dir)
        self._interval_s = interval_s
        self._log = log
        self._stop = threading.Event()
        self._failing = False
        self._thread: threading.Thread | None = None
        if self._tracker.live:
            self._thread = threading.Thread(target=self._feed, name="tracking", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Send the rest and end the thread; what is not sent in `timeout_s` waits for the next `sync_run`."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._log.warning(
                "%s is slow to answer; `python tools/sync_mlflow.py %s` sends the rest",
                self._tracker.address, self._tracker.run_dir,
            )  # fmt: skip

    def _feed(self) -> None:
        wait_s = self._interval_s
        last = False
        while not last:
            last = self._stop.wait(wait_s)
            try:
                self._tracker.require_answer()
                self._tracker.push()
                self._failing = False
                wait_s = self._interval_s
            except Exception as error:
                self._warn_once(error)
                wait_s = min(2 * wait_s, LONGEST_WAIT * self._interval_s)

    def _warn_once(self, error: Exception) -> None:
        """Warn at the beginning of an outage only."""
        if not self._failing:
            message = redact(str(error))
            run_dir = self._tracker.run_dir
            self._log.warning("%s; `python tools/sync_mlflow.py %s` sends it later", message, run_dir)
        self._failing = True

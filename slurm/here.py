"""Run the chain on this machine: wait for each job, show rank 0's log, stop on Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from slurm import ledger
from slurm.chain import Chain, Step
from slurm.launcher import submit

if TYPE_CHECKING:
    from submitit import Job

POLL_S = 0.2
PEERS_LEAVE_S = 30.0  # ranks that still run this long after another one's error are killed
TAIL_LINES = 25


def run_all(chain: Chain, after_each: Callable[[Path], None]) -> None:
    """Run the jobs one after the other, with `after_each(run_dir)` behind each, also behind one that failed.

    Raises UserError with a stage's message; SystemExit with the end of the failing rank's log; KeyboardInterrupt
    (also for SIGTERM) after the job was stopped.
    """
    with _terminate_is_interrupt():
        for step in chain.steps:
            (job,) = submit([step])
            print(
                f"{step.name}: job {job.job_id}, {job.num_tasks} process(es), logs in {_logs(step)}",
                flush=True,
            )
            try:
                _finish(job, step)
            finally:
                after_each(step.run.run_dir)


def _finish(job: Job[None], step: Step) -> None:
    if step.run.config.cluster.executor == "debug":
        with suppress(SystemExit):  # other errors end in the debugger and come back here with their traceback
            job.results()
    else:
        _follow(job, step)
    _require_success(job, step)


def _follow(job: Job[None], step: Step) -> None:
    """Print rank 0's log as it grows until all ranks have left; Ctrl-C asks them to stop, a second one kills them."""
    log = LogTail(_logs(step) / "rank0.log")
    try:
        _watch(job, step, log)
    except KeyboardInterrupt:
        print(
            f"{step.name}: stopping; work in flight is finished and saved (again: kill)",
            file=sys.stderr,
            flush=True,
        )
        os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller passes it on to the ranks
        try:
            _watch(job, step, log)
        except KeyboardInterrupt:
            _kill_ranks(job)
            _watch(job, step, log)
        raise


def _watch(job: Job[None], step: Step, log: LogTail) -> None:
    while not job.done():
        log.show()
        if ledger.failed_for_s(step.run.run_dir, step.stage) > PEERS_LEAVE_S:
            _kill_ranks(job)
        time.sleep(POLL_S)
    log.show()


def _require_success(job: Job[None], step: Step) -> None:
    run_dir, stage = step.run.run_dir, step.stage
    failure, state = ledger.failure(run_dir, stage), ledger.state(run_dir, stage, job.job_id)
    if failure is None and state == "COMPLETED":
        return
    if state in ("RUNNING", "SUBMITTED"):  # rank 0 was killed and could not say so
        ledger.ended(run_dir, stage, job.job_id, "FAILED")
    if failure and failure["user"]:
        raise UserError(failure["message"])
    if failure is None and state in ("CANCELLED", "REQUEUED"):
        raise SystemExit(f"{step.name}: was asked to stop; the same command continues it")
    rank = failure["rank"] if failure else 0
    paths = job.task(rank).paths
    silent = [k for k in range(job.num_tasks) if not job.task(k).paths.result_pickle.exists()]
    killed = f" (ranks {silent} ended without a word: killed, or out of memory?)" if silent else ""
    raise SystemExit(f"{step.name}: failed on rank {rank}{killed}\n{tail(paths.stderr)}\nlog: {paths.stderr}")


class LogTail:
    """Prints what is added to a file from now on."""

    def __init__(self, file: Path) -> None:
        """Start at the present end of `file`, which need not exist yet."""
        self._file, self._position = file, file.stat().st_size if file.exists() else 0

    def show(self) -> None:
        """Print what is new."""
        if not self._file.exists():
            return
        with open(self._file, "rb") as opened:
            opened.seek(self._position)
            new = opened.read()
        self._position += len(new)
        if new:
            print(new.decode(errors="replace"), end="", flush=True)


def tail(file: Path) -> str:
    """The last lines of a log."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return "\n".join(lines[-TAIL_LINES:]) or "(the log is empty)"


def _logs(step: Step) -> Path:
    return step.run.run_dir / "logs" / step.stage


def _kill_ranks(job: Job[None]) -> None:
    """SIGKILL to the controller's children; the controller itself then ends in order."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    with suppress(OSError):
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def _terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM to the launcher stops the job as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

"""Follow a job of this machine: show its log, report its error, handle signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from slurm import ledger
from slurm.chain import Step
from slurm.executors.view import StageView
from slurm.status import tail

if TYPE_CHECKING:
    from submitit import Job

POLL_S = 0.2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # to the launcher they mean the same as Ctrl-C
PEERS_LEAVE_S = 30.0  # ranks that still run this long after another rank's error are killed


def watch(job: Job[None], step: Step, view: StageView) -> None:
    """Show the stage until all ranks have left."""
    while not job.done():
        view.show()
        if ledger.failed_for_s(step.run.run_dir, step.stage, job.job_id) > PEERS_LEAVE_S:
            kill_ranks(job)
        time.sleep(POLL_S)
    view.show()


def require_success(job: Job[None], step: Step) -> None:
    """Raise the job's error: UserError for a user's mistake, otherwise SystemExit with the end of a log."""
    run_dir = step.run.run_dir
    failure = ledger.failure(run_dir, step.stage, job.job_id)
    state = ledger.state(run_dir, step.stage, job.job_id)
    if failure is None and state == "COMPLETED":
        return
    if failure is None and state in ("CANCELLED", "REQUEUED"):
        raise SystemExit(f"{step.name}: was asked to stop; the same command continues it")
    if state in ("RUNNING", "SUBMITTED"):  # rank 0 could not record its end
        ledger.note_silent_end(run_dir, step.stage, job.paths.folder, job.job_id)
        ledger.ended(run_dir, step.stage, job.job_id, "FAILED")
        failure = ledger.failure(run_dir, step.stage, job.job_id)
    if failure and failure["user"]:
        raise UserError(failure["message"])
    rank = failure["rank"] if failure else 0
    log = job.task(rank).paths.stderr
    silent = [k for k in range(job.num_tasks) if not job.task(k).paths.result_pickle.exists()]
    hint = f" (ranks {silent} ended without a result: killed, or out of memory?)" if silent else ""
    raise SystemExit(f"{step.name}: failed on rank {rank}{hint}\n{tail(log)}\nlog: {log}")


def logs_of(step: Step) -> Path:
    """Return the folder with the logs of a stage."""
    return step.run.run_dir / "logs" / step.stage


def kill_ranks(job: Job[None]) -> None:
    """Send SIGKILL to the controller's children; the controller itself then ends in order."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    with suppress(OSError):
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


# ---- signals


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Treat SIGTERM and a hang-up like Ctrl-C. A signal that is ignored stays ignored (nohup)."""
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """Start processes that do not hear Ctrl-C and hang-up; this one hears them when the block ends.

    A terminal sends both to every process; the ranks must hear them from the launcher, as a stop request.
    A new process inherits what its parent blocks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C and its like back until the block ends, or until it calls the function that it gets.

    That function raises KeyboardInterrupt if one has come. A job that has just started is not lost so.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, *STOP_SIGNALS)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in heard}

    def release() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if came:
            came.clear()
            raise KeyboardInterrupt

    try:
        yield release
    finally:
        release()

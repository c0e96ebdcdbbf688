"""What submitit pickles: run directories and a stage. All state is on disk, so an old pickle is as good as a new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from pipeline.errors import UserError
from pipeline.run import run_stage
from pipeline.runtime.preempt import StopFlag, Stopped
from slurm import ledger
from slurm.chain import FINISH
from slurm.queue import FINAL, state_of


@dataclass(frozen=True)
class StageJob:
    """One stage of one run, or the k-th of n parts of it, as a job of any executor; called on every rank."""

    run_dir: str
    stage: str
    part: tuple[int, int] | None = None

    def __call__(self) -> None:
        """Run the stage, note how it ended, and give a stopped job back to submitit.

        Exits with 2 after a UserError, which is in logs/<stage>/error.json then.
        """
        run_dir, stop = Path(self.run_dir), StopFlag()
        environment = JobEnvironment()
        rank = environment.global_rank
        try:
            with stop:  # before the slow imports: from here on a signal loses nothing
                clear_unfinished(environment)
                export_ranks(environment)
                if rank == 0:
                    ledger.started(run_dir, self.stage, environment.job_id, list(environment.hostnames))
                self.run(stop)
            self._end(environment, "COMPLETED")
        except Stopped:
            self._hand_back(environment, stop)
        except Exception as error:
            if stop.requested and rank != 0:
                sys.exit(
                    0
                )  # rank 0 was quicker to leave for the requeue; an error here would count as the job's result
            self._fail(environment, error)
            raise

    def run(self, stop: StopFlag) -> None:
        """The stage itself (all ranks)."""
        run_stage(Path(self.run_dir), self.stage, stop, self.part, JobEnvironment().job_id)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues: the same again, since the stage finds its newest checkpoint by itself."""
        return DelayedSubmission(self)

    def _hand_back(self, environment: JobEnvironment, stop: StopFlag) -> None:
        """Requeue after submitit's signal (rank 0, by submitit's own handler), end after SIGTERM; the others leave quietly.

        SIGTERM alone means scancel, Ctrl-C, or a requeue that Slurm does by itself: requeuing then would undo the wish.
        """
        if environment.global_rank != 0:
            sys.exit(
                0
            )  # not non-zero: srun --kill-on-bad-exit would kill rank 0 before it has requeued the job
        handler = signal.getsignal(signal.SIGUSR2)
        if stop.received != {signal.SIGTERM} and callable(handler):
            self._end(environment, "REQUEUED")
            try:
                handler(signal.SIGUSR2, None)  # exits, or raises where the job was stopped too many times
            except subprocess.SubprocessError:
                pass  # scontrol was refused: Slurm is ending or requeuing the job already
            except Exception as error:
                self._fail(environment, error)
                raise
        self._end(
            environment,
            "CANCELLED" if environment.name() != "slurm" or cancelled(environment) else "REQUEUED",
        )
        sys.exit(128 + signal.SIGTERM)

    def _fail(self, environment: JobEnvironment, error: Exception) -> None:
        ledger.note_failure(Path(self.run_dir), self.stage, environment.global_rank, error)
        self._end(environment, "FAILED")
        if isinstance(error, UserError):
            if environment.name() != "debug":  # there the launcher prints it, in this very process
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    def _end(self, environment: JobEnvironment, state: str) -> None:
        if environment.global_rank == 0:
            ledger.ended(Path(self.run_dir), self.stage, environment.job_id, state)


@dataclass(frozen=True)
class FinishJob:
    """The last job of a launch: whatever became of the others, MLflow and the comparison say so."""

    run_dirs: tuple[str, ...]
    sweep: str | None

    def __call__(self) -> None:
        """Finish every run; exits with 2 after a UserError."""
        from slurm.finish import finish

        job_id, hosts = JobEnvironment().job_id, list(JobEnvironment().hostnames)
        run_dirs = [Path(run_dir) for run_dir in self.run_dirs]
        for run_dir in run_dirs:
            ledger.started(run_dir, FINISH, job_id, hosts)
        state = "FAILED"
        try:
            print(finish(run_dirs, Path(self.sweep) if self.sweep else None))
            state = "COMPLETED"
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            for run_dir in run_dirs:
                ledger.ended(run_dir, FINISH, job_id, state)

    def checkpoint(self) -> DelayedSubmission:
        """The same again."""
        return DelayedSubmission(self)


def clear_unfinished(environment: JobEnvironment) -> None:
    """Remove what an attempt that was killed while it wrote its result left behind: submitit refuses to write over it."""
    if environment.name() != "debug":
        for file in (environment.paths.result_pickle, environment.paths.submitted_pickle):
            file.with_suffix(f"{file.suffix}.save_tmp").unlink(missing_ok=True)


def cancelled(environment: JobEnvironment) -> bool:
    """Whether Slurm is ending this job for good, and not requeuing it."""
    return (state_of(environment.raw_job_id) or "CANCELLED") in FINAL


def export_ranks(environment: JobEnvironment) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, all that the pipeline reads.

    CUDA_VISIBLE_DEVICES stays as it is: a rank picks its GPU by LOCAL_RANK.
    """
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if environment.num_nodes == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a host's own name need not resolve

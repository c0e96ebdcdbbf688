"""The callables that submitit pickles: run directories and a stage.

All state is on disk. After a node failure Slurm starts the original pickle, which works like a new one.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from pipeline.config.load import digest
from pipeline.errors import UserError, as_user_error
from pipeline.run import run_stage, sync_evaluation
from pipeline.rundir.record import evaluations, run_config
from pipeline.runtime.preempt import StopFlag, Stopped
from slurm import ledger
from slurm.queue import FINAL, state_of
from slurm.rank import export_ranks, port_file, require_gpus
from slurm.resources import FINISH

LONGEST_NAME = 80  # characters of a comparison's file name
ENDING = {signal.SIGTERM, signal.SIGHUP}  # requests to end for good; SIGUSR2 asks for a requeue


@dataclass(frozen=True)
class StageJob:
    """One stage of one run, or the k-th of n parts of it, as a job of any executor. Called on every rank."""

    run_dir: str
    stage: str
    part: tuple[int, int] | None = None
    config_file: str = ""  # settings of this job alone; empty: run_dir/config.yaml

    def __call__(self) -> None:
        """Run the stage, record how it ended, and give a stopped job back to submitit.

        Exits with 2 after a UserError; its message is then in logs/<stage>/error.json.
        """
        run_dir = Path(self.run_dir)
        stop = StopFlag()
        environment = JobEnvironment()
        rank = environment.global_rank
        try:
            with stop:  # before the slow imports: from here on a signal loses nothing
                clear_unfinished(environment)
                if rank == 0:
                    hosts = list(environment.hostnames)
                    ledger.started(run_dir, self.stage, environment.job_id, hosts)
                export_ranks(environment, stop)
                self.run(stop)
            self._end(environment, "COMPLETED")
        except Stopped:
            self._hand_back(environment, stop)
        except Exception as error:
            if stop.requested and rank != 0:
                # Rank 0 has left for the requeue already. An error here would count as the job's result.
                sys.exit(0)
            self._fail(environment, error)
            raise

    def run(self, stop: StopFlag) -> None:
        """Run the stage itself (all ranks)."""
        environment = JobEnvironment()
        run_dir = Path(self.run_dir)
        file = Path(self.config_file) if self.config_file else None
        require_gpus(environment, run_config(run_dir, file), self.stage)
        run_stage(run_dir, self.stage, stop, self.part, environment.job_id, file)
        if environment.name() == "slurm":  # elsewhere the launcher waits and does it
            sync_evaluation(run_dir, self.stage)

    def checkpoint(self) -> DelayedSubmission:
        """Tell submitit to requeue the same job; the stage finds its newest checkpoint itself."""
        return DelayedSubmission(self)

    def _hand_back(self, environment: JobEnvironment, stop: StopFlag) -> None:
        """Requeue after submitit's signal (rank 0, by submitit's own handler). End after SIGTERM or SIGHUP.

        SIGTERM alone means scancel, Ctrl-C, or a requeue that Slurm does itself: a requeue here would
        undo it. The other ranks leave quietly.
        """
        if environment.global_rank != 0:
            # Not with an error: srun --kill-on-bad-exit would kill rank 0 before it has requeued the job.
            sys.exit(0)
        asked_to_end = bool(stop.received) and stop.received <= ENDING
        handler = signal.getsignal(signal.SIGUSR2)
        if not asked_to_end and callable(handler):
            self._end(environment, "REQUEUED")
            port_file(environment).unlink(missing_ok=True)  # the next attempt finds another port
            try:
                handler(signal.SIGUSR2, None)  # exits, or raises if the job was stopped too many times
            except subprocess.SubprocessError:
                pass  # scontrol was refused: Slurm is ending or requeuing the job already
            except Exception as error:
                self._fail(environment, error)
                raise
        for_good = environment.name() != "slurm" or cancelled(environment)
        self._end(environment, "CANCELLED" if for_good else "REQUEUED")
        sys.exit(128 + signal.SIGTERM)

    def _fail(self, environment: JobEnvironment, error: Exception) -> None:
        error = as_user_error(error)
        rank, job_id = environment.global_rank, environment.job_id
        ledger.note_failure(Path(self.run_dir), self.stage, rank, error, job_id)
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
    """The last job of a launch: it updates MLflow and the comparison, whatever became of the other jobs."""

    run_dirs: tuple[str, ...]
    sweep: str | None

    def __call__(self) -> None:
        """Finish every run; exits with 2 after a UserError."""
        environment = JobEnvironment()
        run_dirs = [Path(run_dir) for run_dir in self.run_dirs]
        for run_dir in run_dirs:
            ledger.started(run_dir, FINISH, environment.job_id, list(environment.hostnames))
        state = "FAILED"
        try:
            print(finish(run_dirs, Path(self.sweep) if self.sweep else None))
            state = "COMPLETED"
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            for run_dir in run_dirs:
                ledger.ended(run_dir, FINISH, environment.job_id, state)

    def checkpoint(self) -> DelayedSubmission:
        """Tell submitit to requeue the same job."""
        return DelayedSubmission(self)


def finish(run_dirs: list[Path], sweep: Path | None = None) -> str:
    """Bring jobs.json, MLflow and the comparison of `run_dirs` up to date; return the numbers as text.

    `sweep`: folder of the sweep that the runs belong to, for its table.
    """
    from pipeline.reporting.comparison import compare
    from pipeline.reporting.seeds import seed_table
    from pipeline.tracking.sync import make_tracker, sync_run, sync_sweep
    from slurm.announce import closing
    from slurm.status import refresh

    for run_dir in run_dirs:
        refresh(run_dir)
        sync_run(run_dir)
    config = run_config(run_dirs[0])
    evaluated = [run_dir for run_dir in run_dirs if evaluations(run_dir)]
    pages = []
    if len(evaluated) > 1 or (evaluated and sweep):
        pages.append(comparison_page(evaluated, Path(config.runs_dir), sweep))
        compare(evaluated, pages[0])
    if evaluated and sweep:
        tables = seed_table(evaluated, sweep)
        sync_sweep(config, sweep.name, [*tables, *pages])
        pages += tables
    return closing(run_dirs, pages, make_tracker(run_dirs[0], config).viewer)


def comparison_page(run_dirs: list[Path], runs_dir: Path, sweep: Path | None) -> Path:
    """Return the file of a comparison. Its name says which runs it compares, so it replaces no other one."""
    if sweep:
        return sweep / "comparison.html"
    names = sorted(run_dir.name for run_dir in run_dirs)
    listed = "_and_".join(names)
    if len(listed) > LONGEST_NAME:
        listed = f"{names[0]}_and_{len(names) - 1}_others_{digest(names)[:6]}"
    return runs_dir / "_comparisons" / f"comparison_of_{listed}.html"


def clear_unfinished(environment: JobEnvironment) -> None:
    """Delete temporary files of an attempt that was killed as it wrote. Submitit would not replace them."""
    if environment.name() == "debug":
        return
    for file in (environment.paths.result_pickle, environment.paths.submitted_pickle):
        file.with_suffix(f"{file.suffix}.save_tmp").unlink(missing_ok=True)


def cancelled(environment: JobEnvironment) -> bool:
    """Whether Slurm is ending this job for good, rather than requeuing it."""
    return (state_of(environment.raw_job_id) or "CANCELLED") in FINAL

"""What is done when all jobs of a launch have ended, well or badly: true states, MLflow, the comparison."""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluation.compare import compare
from pipeline.runtime.record import evaluations, run_config
from pipeline.runtime.tracking import sync_run
from slurm import ledger


def finish(run_dirs: list[Path], sweep: Path | None) -> str:
    """Bring jobs.json, MLflow and the comparison of `run_dirs` up to date; returns the comparison as text."""
    for run_dir in run_dirs:
        ledger.refresh(run_dir)
        sync_run(run_dir)
    evaluated = [run_dir for run_dir in run_dirs if evaluations(run_dir)]
    missing = [f"{run_dir.name}: no complete evaluation" for run_dir in run_dirs if run_dir not in evaluated]
    if not evaluated:
        return "\n".join(missing)
    page = (sweep or Path(run_config(run_dirs[0]).runs_dir)) / "comparison.html"
    return "\n".join([compare(evaluated, page), *missing])

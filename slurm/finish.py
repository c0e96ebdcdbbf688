"""What is done when all jobs of a launch have ended, well or badly: true states, MLflow, the comparison."""

from __future__ import annotations

from pathlib import Path

from pipeline.reporting.comparison import compare
from pipeline.reporting.seeds import seed_table
from pipeline.rundir.record import evaluations, run_config
from pipeline.tracking.sync import sync_run, sync_sweep
from slurm import ledger


def finish(run_dirs: list[Path], sweep: Path | None = None) -> str:
    """Bring jobs.json, MLflow and the comparison of `run_dirs` up to date; returns the comparison and where to look, as text.

    `sweep`: folder of the sweep that the runs belong to, for its table.
    """
    for run_dir in run_dirs:
        ledger.refresh(run_dir)
        sync_run(run_dir)
    evaluated = [run_dir for run_dir in run_dirs if evaluations(run_dir)]
    lines = [f"{run_dir.name}: no complete evaluation" for run_dir in run_dirs if run_dir not in evaluated]
    if not evaluated:
        return "\n".join(lines)
    config = run_config(run_dirs[0])
    page = (sweep or Path(config.runs_dir)) / "comparison.html"
    text = compare(evaluated, page)
    lines += [f"report: {run_dir / 'report.html'}" for run_dir in evaluated] + [f"comparison: {page}"]
    if sweep:
        tables = seed_table(evaluated, sweep)
        sync_sweep(config, sweep.name, [*tables, page])
        lines += [f"table: {file}" for file in tables]
    return "\n".join([text, "", *lines])

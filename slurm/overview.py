"""All runs below a folder, one a line: what they do now, how far they are, what was measured last."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.errors import UserError, as_user_error
from pipeline.reporting.text import duration, text_table
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import evaluations, run_config
from slurm.status import refresh, states_in_words

HEAD = ["run", "now", "images", "of", "evaluations", "last change"]


def all_runs(runs_dir: Path) -> list[Path]:
    """Return the run directories in `runs_dir` and in the folders in it, in the order of their names."""
    found = [*runs_dir.glob("*/config.yaml"), *runs_dir.glob("*/*/config.yaml")]
    return sorted(file.parent for file in found if not file.parent.name.startswith("_"))


def overview(run_dirs: list[Path], runs_dir: Path) -> str:
    """Return the table of all runs; a run that cannot be read is a line below it."""
    rows, problems = [], []
    for run_dir in run_dirs:
        try:
            rows.append(_row(run_dir, runs_dir))
        except (UserError, OSError) as error:  # a colleague's run may be closed to others
            problems.append(f"{run_dir}: {as_user_error(error)}")
    table = text_table(HEAD, rows) or f"no runs in {runs_dir}; `python launch.py` makes the first"
    return "\n".join([table, *problems])


def _row(run_dir: Path, runs_dir: Path) -> list[str]:
    config = run_config(run_dir)
    measured = [str(evaluation.number) for evaluation in evaluations(run_dir)]
    return [
        str(run_dir.relative_to(runs_dir)),
        states_in_words(refresh(run_dir)),
        f"{_images(run_dir, config):,}",
        f"{config.train.images:,}",
        ", ".join(measured) or "–",
        f"{duration(max(0.0, time.time() - _last_change(run_dir)))} ago",
    ]


def _images(run_dir: Path, config: RunConfig) -> int:
    """Images trained on so far, as far as the log tells."""
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    return int(records[-1]["step"]) * config.train.batch_size if records else 0


def _last_change(run_dir: Path) -> float:
    """Unix time of the last write to the files that grow, seconds."""
    files = [run_dir / "config.yaml", run_dir / "jobs.json", layout.train_dir(run_dir) / "metrics.jsonl"]
    return max(file.stat().st_mtime for file in files if file.exists())

"""The curves of a run in MLflow: its training, and how busy its nodes were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import PHASES
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from pipeline.tracking.mlflow.store import clean_name


def curve_points(run_dir: Path) -> Iterator[tuple[int, float, str, float]]:
    """Yield (step, unix seconds, name in MLflow, value) of everything that the run has recorded.

    Names that begin with `system/` are shown under "System metrics"; their step is the number of the sample.
    """
    for phase in PHASES:
        for record in read_metrics(layout.train_dir(run_dir, phase) / "metrics.jsonl"):
            for written, value in record["values"].items():
                yield record["step"], record["time"], curve_name(phase, written), value
    for file in sorted(layout.nodes_dir(run_dir).glob("*.jsonl")):
        for record in read_metrics(file):
            for written, value in record["values"].items():
                yield record["step"], record["time"], clean_name(written), value


def curve_name(phase: str, written: str) -> str:
    """Return a curve's name in MLflow: `train/loss` of the phase tune is `tune/loss`.

    `val_ema/loss` is `tune_val_ema/loss`. Those of the main training keep their names.
    """
    if phase == "train":
        return written
    source, _, name = written.partition("/")
    return f"{phase}/{name}" if source == "train" else f"{phase}_{written}"

"""Look into an MLflow store."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.rundir.metrics_log import read_metrics
from pipeline.tracking.mlflow import store as mlflow_store


def client(runs_dir: Path) -> Any:
    return mlflow_store.open_client(f"sqlite:///{runs_dir}/mlflow.db")


def runs_of(store: Any, experiment: str) -> list[Any]:
    return store.search_runs([store.get_experiment_by_name(experiment).experiment_id])


def parent_of(store: Any, experiment: str) -> Any:
    (parent,) = [r for r in runs_of(store, experiment) if "mlflow.parentRunId" not in r.data.tags]
    return parent


def assert_holds_file_once(store: Any, run_id: str, run_dir: Path) -> None:
    """Every finite value of metrics.jsonl is in the store exactly once, with its own time."""
    wanted: dict[str, Counter] = {}
    for record in read_metrics(run_dir / "train/metrics.jsonl"):
        for name, value in record["values"].items():
            if math.isfinite(value):
                wanted.setdefault(name, Counter())[record["step"], value, int(record["time"] * 1000)] += 1
    assert wanted
    for name, points in wanted.items():
        assert (
            Counter((m.step, m.value, m.timestamp) for m in store.get_metric_history(run_id, name)) == points
        ), name

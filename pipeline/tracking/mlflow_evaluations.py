"""Evaluations in MLflow: each one is a child run, and the headline numbers stand on the parent too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.config.load import digest
from pipeline.rundir.record import Evaluation
from pipeline.tracking import mlflow_store
from pipeline.tracking.mlflow_store import as_text, clean_name, held_metric, set_tags, the_run

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


def send_evaluation(client: MlflowClient, parent: Run, variant: str, evaluation: Evaluation) -> str:
    """Send one evaluation as a finished child run; complete one that an earlier pass left half done.

    Return the child's run id.
    """
    from mlflow.entities import Metric

    mark = {"mlflow.parentRunId": parent.info.run_id, "eval_number": str(evaluation.number)}
    ended_ms = _written_ms(evaluation)
    took_ms = int(sum(evaluation.seconds.values()) * 1000)
    name = f"eval_{evaluation.number}"
    child = the_run(client, parent.info.experiment_id, mark, ended_ms - took_ms, name)
    run_id = str(child.info.run_id)
    if child.info.status == "FINISHED":
        return run_id
    protocol = {clean_name(key): as_text(value) for key, value in evaluation.protocol.items()}
    new_params = {key: value for key, value in protocol.items() if key not in child.data.params}
    mlflow_store.log_params(client, run_id, new_params)
    step = int(evaluation.protocol.get("step", 0))
    values = dict(_child_values(evaluation))
    missing = [key for key in values if key not in child.data.metrics]
    metrics = [Metric(key, values[key], ended_ms, step) for key in missing]
    mlflow_store.log_metrics(client, run_id, metrics)
    set_tags(client, child, {"variant": variant, "split": str(evaluation.protocol.get("split", ""))})
    client.set_terminated(run_id, "FINISHED", ended_ms)
    return run_id


def _child_values(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of every finite number: metrics, interval ends, ceilings and floors."""
    named: list[tuple[str, Any]] = list(evaluation.metrics.items())
    for name, (low, high) in evaluation.intervals.items():
        named += [(f"{name}_low", low), (f"{name}_high", high)]
    named += [(f"ceiling.{name}", value) for name, value in evaluation.ceilings.items()]
    named += [(f"floor.{name}", value) for name, value in evaluation.floors.items()]
    for name, value in named:
        if value is not None and math.isfinite(value):
            yield clean_name(name), float(value)


def send_headline(client: MlflowClient, run: Run, headline: Evaluation) -> None:
    """Send the headline evaluation's metrics to the parent, unless its step already shows them."""
    from mlflow.entities import Metric

    split = headline.protocol.get("split", "test")
    step = int(headline.protocol.get("step", 0))
    new = []
    for name, value in headline.metrics.items():
        key = clean_name(f"{split}/{name}")
        at_this_step = [m for m in held_metric(client, run, key) if m.step == step]
        shown = max(at_this_step, key=lambda m: m.timestamp).value if at_this_step else None
        if value is not None and math.isfinite(value) and shown != value:
            new.append(Metric(key, float(value), _written_ms(headline), step))
    mlflow_store.log_metrics(client, run.info.run_id, new)
    tags = {
        "headline.eval": str(headline.number),
        "headline.protocol": digest(headline.comparable),  # runs with the same digest may be compared
        "headline.complete": str(headline.complete),
    }
    set_tags(client, run, tags)


def _written_ms(evaluation: Evaluation) -> int:
    return int((evaluation.folder / "metrics.json").stat().st_mtime * 1000)

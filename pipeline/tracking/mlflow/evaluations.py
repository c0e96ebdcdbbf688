"""Evaluations in MLflow: each one is a child run, and the headline evaluation's numbers stand on the parent.

Numbers are logged at step 0: MLflow then draws them as bars, and a number at another step as a curve of
one point. Their names are `distance`, `obedience` and so on for the six of the headline, and
`eval/<metric>/<name>` for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.config.load import digest
from pipeline.rundir.headline import HEADLINES, standing_for
from pipeline.rundir.record import Evaluation
from pipeline.tracking.mlflow import store as mlflow_store
from pipeline.tracking.mlflow.describe import evaluation_note
from pipeline.tracking.mlflow.store import as_text, clean_name, set_tags, the_run

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

NOTE = "mlflow.note.content"  # the description of a run
RUN_NAME = "mlflow.runName"


def send_evaluation(client: MlflowClient, parent: Run, variant: str, evaluation: Evaluation) -> str:
    """Send one evaluation as a finished child run; complete one that an earlier pass left half done.

    A number is given again after its folder was removed. Then the earlier child keeps its numbers, aside.
    Return the child's run id.
    """
    mark = {"mlflow.parentRunId": parent.info.run_id, "eval_number": str(evaluation.number)}
    ended_ms = _written_ms(evaluation)
    took_ms = int(sum(evaluation.seconds.values()) * 1000)
    split, n = evaluation.protocol.get("split", ""), evaluation.protocol.get("n", "")
    name = f"{parent.info.run_name} eval {evaluation.number} ({split}, N={n})"
    values = dict(_named(evaluation)) | dict(_references(evaluation))
    child = the_run(client, parent.info.experiment_id, mark, ended_ms - took_ms, name)
    if child.info.status == "FINISHED" and _other_numbers(child, values):
        _set_aside(client, child)
        child = the_run(client, parent.info.experiment_id, mark, ended_ms - took_ms, name)
    run_id = str(child.info.run_id)
    if child.info.status == "FINISHED":
        return run_id
    protocol = {clean_name(key): as_text(value) for key, value in evaluation.protocol.items()}
    new_params = {key: value for key, value in protocol.items() if key not in child.data.params}
    mlflow_store.log_params(client, run_id, new_params)
    _log_new(client, child, values, ended_ms)
    tags = {"variant": variant, "split": str(split), NOTE: evaluation_note(evaluation)}
    set_tags(client, child, tags)
    client.set_terminated(run_id, "FINISHED", ended_ms)
    return run_id


def _other_numbers(child: Run, values: dict[str, float]) -> bool:
    """Return whether a finished child shows another evaluation, whose folder was removed since."""
    shown = child.data.metrics
    return any(shown.get(name, value) != value for name, value in values.items())


def _set_aside(client: MlflowClient, child: Run) -> None:
    """Free the number of a child whose evaluation was removed; it keeps its own numbers."""
    from mlflow.entities import RunTag

    name = f"{child.info.run_name} (removed)"
    tags = [RunTag("eval_number", f"{child.data.tags['eval_number']} (removed)"), RunTag(RUN_NAME, name)]
    client.log_batch(child.info.run_id, tags=tags)


def send_headline(client: MlflowClient, run: Run, headline: Evaluation) -> None:
    """Show the headline evaluation's numbers on the parent, and no number of an earlier one."""
    values = dict(_named(headline))
    keys = {headline.key for headline in HEADLINES}
    shown = {key for key, value in run.data.metrics.items() if not math.isnan(value)}
    stale = {key for key in shown - values.keys() if key in keys or key.startswith("eval/")}
    _log_new(client, run, values | dict.fromkeys(stale, math.nan), _written_ms(headline))  # it deletes none
    tags = {
        "headline.eval": str(headline.number),
        "headline.split": str(headline.protocol.get("split", "")),
        "headline.protocol": digest(headline.comparable),  # runs with the same digest may be compared
        "headline.complete": str(headline.complete),
        "headline.reads": f"{len(headline.read)} of {len(headline.per_attribute)} attributes",
    }
    set_tags(client, run, tags)


def _log_new(client: MlflowClient, run: Run, values: dict[str, float], time_ms: int) -> None:
    """Log the values that the run does not show; of several at step 0 the newest one is shown."""
    from mlflow.entities import Metric

    held = run.data.metrics
    new = [key for key, value in values.items() if held.get(key) != value]
    mlflow_store.log_metrics(client, run.info.run_id, [Metric(key, values[key], time_ms, 0) for key in new])


def _named(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """Yield (name in MLflow, value): the six numbers of the headline, then all others in groups."""
    for headline in HEADLINES:
        name = standing_for(headline, [evaluation])
        if name:
            yield headline.key, float(evaluation.metrics[name])
    for name in evaluation.headline_names:
        value = evaluation.metrics[name]
        group = evaluation.about.get(name, {}).get("group") or "other"
        if value is not None and math.isfinite(value):
            yield clean_name(f"eval/{group}/{name}"), float(value)


def _references(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of interval ends, ceilings and floors, as one group behind `eval/`."""
    named: list[tuple[str, Any]] = []
    for name, (low, high) in evaluation.intervals.items():
        named += [(f"reference/{name}_low", low), (f"reference/{name}_high", high)]
    named += [(f"reference/{name}_ceiling", value) for name, value in evaluation.ceilings.items()]
    named += [(f"reference/{name}_floor", value) for name, value in evaluation.floors.items()]
    for name, value in named:
        if value is not None and math.isfinite(value):
            yield clean_name(name), float(value)


def _written_ms(evaluation: Evaluation) -> int:
    return int((evaluation.folder / "metrics.json").stat().st_mtime * 1000)

"""The view "At a glance" of an experiment in MLflow: evaluated runs, best first, and their six numbers.

MLflow keeps the views that people save in its pages as tags of the experiment. It has no call to make one,
so this writes such a tag. A version of MLflow that reads another format leaves the view out of its list.
"""

from __future__ import annotations

import json

from pipeline.rundir.headline import HEADLINES

KEY = "at_a_glance"  # in addresses of the view
TAG = f"mlflow.sharedViewState.{KEY}"
SECTION = "distance, memorised: low is good"  # the others: high
COLUMNS = (
    "params.`model.prior.name`",
    "params.`model.variance.name`",
    "params.`train.images`",
    "params.`seed`",
    "tags.`headline.protocol`",
)


def view_address(experiment_id: str) -> str:
    """Return the address of the view in MLflow's pages, without the server."""
    query = f"viewStateShareKey={KEY}&compareRunsMode=CHART&workflowType=machine_learning"
    return f"#/experiments/{experiment_id}/runs?{query}"


def view_tag() -> str:
    """Return the view as MLflow 3.17 keeps it in the tag TAG."""
    created_ms = 0  # the same text at every pass
    view = {"name": "At a glance", "createdAt": created_ms, "updatedAt": created_ms}
    return json.dumps({**view, "state": json.dumps(_rows() | _charts())})


def _rows() -> dict[str, object]:
    """The table: evaluated runs without their child runs, in the order of the first headline."""
    return {
        "searchFilter": "tags.`headline.eval` != ''",
        "orderByKey": f"metrics.`{HEADLINES[0].key}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [f"metrics.`{headline.key}`" for headline in HEADLINES] + list(COLUMNS),
    }


def _charts() -> dict[str, object]:
    """Bars of the headlines above all other charts, which MLflow adds by itself."""
    section = {"uuid": KEY, "name": SECTION, "display": True, "isReordered": True}
    section |= {"columns": 2, "cardHeight": 190}  # pixels: a title is legible, and all six fit a screen
    bars = []
    for headline in HEADLINES:
        bar = {"uuid": f"{KEY}_{headline.key}", "type": "BAR", "metricKey": headline.key}
        bars.append({**bar, "metricSectionId": KEY, "runsCountToCompare": 20, "isGenerated": False})
    return {"compareRunCharts": bars, "compareRunSections": [section], "isAccordionReordered": True}

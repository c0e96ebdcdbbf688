"""MLflow's own pages: an experiment opens as a table of runs, and the six numbers come first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pipeline.rundir.headline import HEADLINES
from pipeline.tracking.mlflow import store as mlflow_store
from pipeline.tracking.mlflow.view import view_address
from pipeline.tracking.sync import tracker_of
from tests.browser import WIDTHS, OpenPage, assert_fits
from tests.fake_run import make_run
from tests.pipeline.tracking.in_store import runs_of

CARD = "[data-testid=experiment-view-compare-runs-card]"  # a chart with its title
BAR = ".js-plotly-plot .bars .point"
ALL_CHARTS = 1400  # pixels: MLflow draws a chart when it comes into view


@pytest.fixture(scope="module")
def compared(server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """The experiment's id and the ids of two evaluated runs."""
    folder = tmp_path_factory.mktemp("compared")
    for name, fd in (("plain", 30.0), ("flow", 21.5)):
        overrides = (f"name={name}", f"tracking.uri={server}", "tracking.experiment=compared")
        run = make_run(folder, name, overrides, steps=12, evals=1, fd=fd)
        (run / "train/done.json").write_text('{"step": 12, "images": 1024}')
        measure_all_six(run / "eval/1/metrics.json")
        tracker_of(run).push()
    store = mlflow_store.open_client(server)
    parents = [run for run in runs_of(store, "compared") if "mlflow.parentRunId" not in run.data.tags]
    return parents[0].info.experiment_id, [run.info.run_id for run in parents]


def measure_all_six(file: Path) -> None:
    """Add the headline numbers that the stand-in evaluation lacks."""
    record = json.loads(file.read_text())
    record["metrics"] |= {"attribute_flip": 0.3, "recall_classifier": 0.6, "memorised": 0.01}
    file.write_text(json.dumps(record))


def test_an_experiment_opens_as_a_table_of_runs(
    server: str, compared: tuple[str, list[str]], open_page: OpenPage
) -> None:
    experiment, _ = compared
    page: Any = open_page(f"{server}/#/experiments/{experiment}?workflowType=machine_learning")
    for name in ("plain", "flow"):
        page.get_by_text(name, exact=True).first.wait_for()
    assert f"/experiments/{experiment}/runs" in page.url
    assert_fits(page)


def test_the_view_at_a_glance_has_the_best_run_first_and_six_bars(
    server: str, compared: tuple[str, list[str]], open_page: OpenPage
) -> None:
    experiment, _ = compared
    page: Any = open_page(f"{server}/{view_address(experiment)}", height=ALL_CHARTS)
    bars = {headline.key: page.locator(CARD, has_text=headline.key).locator(BAR) for headline in HEADLINES}
    for drawn in bars.values():
        drawn.nth(1).wait_for(state="attached")  # one bar for each of the two runs
    assert [drawn.count() for drawn in bars.values()] == [2] * 6
    rows = [page.get_by_role("link", name=name, exact=True).first for name in ("flow", "plain")]
    for row in rows:
        row.wait_for()
    heights = [row.bounding_box()["y"] for row in rows]
    assert heights == sorted(heights)  # the lower distance stands above
    shown = page.inner_text("body").split("\n")
    assert "At a glance" in shown and "Sort: distance" in shown
    assert not any("eval 1" in line for line in shown)  # child runs would be a second bar for each run
    assert_fits(page)


@pytest.mark.parametrize("width", WIDTHS)
def test_comparing_runs_shows_the_headline_numbers(
    server: str, compared: tuple[str, list[str]], open_page: OpenPage, width: int
) -> None:
    experiment, runs = compared
    chosen, within = quote(json.dumps(runs)), quote(json.dumps([experiment]))
    address = f"{server}/#/compare-runs?runs={chosen}&experiments={within}"
    page: Any = open_page(address, width)
    for text in ("Comparing 2 Runs from 1 Experiment", "distance"):
        page.get_by_text(text, exact=True).first.wait_for()
    shown = page.inner_text("body")
    for word in ("plain", "flow", "sharpness", "eval/frechet/fd_classifier_samples"):
        assert word in shown, word
    assert_fits(page)

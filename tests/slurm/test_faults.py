"""A training on a real Slurm that is stopped by a signal ends with the same weights and numbers.

The other faults are in test_faults_wide.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real import FAULTS, STEPS, disturbed, entry, resumed_at, series, weights

from pipeline.tracking.sync import sync_run

pytestmark = pytest.mark.slurm
FAULT = "signal"


@pytest.fixture(scope="module")
def runs(cluster, noise_celeba, tmp_path_factory) -> dict[str, Path]:
    """One undisturbed training and a disturbed one, at the same time, on two nodes with one task each."""
    return disturbed(cluster, tmp_path_factory.mktemp("faults"), noise_celeba, {FAULT: FAULTS[FAULT]}, 1)


def test_final_weights_are_those_of_the_undisturbed_run(runs):
    calm, other = weights(runs["calm"]), weights(runs[FAULT])
    assert calm.keys() == other.keys()
    assert all(torch.equal(calm[name], other[name]) for name in calm)


def test_no_number_is_missing_doubled_or_different(runs):
    assert series(runs[FAULT]) == series(runs["calm"])


def test_mlflow_holds_every_step_once_in_one_finished_run(runs):
    from mlflow import MlflowClient

    sync_run(runs[FAULT])
    client = MlflowClient(f"sqlite:///{runs[FAULT].parent}/mlflow.db")
    experiment = client.get_experiment_by_name("cvae")
    (run,) = client.search_runs([experiment.experiment_id], f"run_name = '{FAULT}'")
    assert run.info.status == "FINISHED"
    assert run.data.tags["attempts.train"] == "2"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(5, STEPS + 1, 5))


def test_it_was_disturbed_and_lost_no_more_than_promised(runs):
    attempts = entry(runs[FAULT], "train")["attempts"]
    assert len(attempts) == 2 and attempts[-1]["state"] == "COMPLETED"
    (at,) = resumed_at(runs[FAULT])
    log = (runs[FAULT] / "logs/train/rank0.log").read_text()
    saved = [line for line in log.splitlines() if "stopped" in line]
    assert attempts[0]["state"] == "REQUEUED" and f"step {at} of" in saved[-1]


def test_the_undisturbed_run_was_left_alone(runs):
    assert len(entry(runs["calm"], "train")["attempts"]) == 1 and resumed_at(runs["calm"]) == []

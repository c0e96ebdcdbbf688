"""A training on a real Slurm ends with the same weights and numbers whatever disturbs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real import AT, FAULTS, INTERVAL, STEPS, disturbed, entry, resumed_at, series, weights

from pipeline.tracking.sync import sync_run

pytestmark = pytest.mark.slurm
# One end with a warning and one without; the others are in test_faults_wide.py.
HERE = ("signal", "kill_slurmd")


@pytest.fixture(scope="module")
def runs(cluster, noise_celeba, tmp_path_factory) -> dict[str, Path]:
    """One undisturbed training and one per fault, all at the same time, on two nodes with one task each."""
    return disturbed(
        cluster, tmp_path_factory.mktemp("faults"), noise_celeba, {name: FAULTS[name] for name in HERE}, 1
    )


@pytest.mark.parametrize("fault", HERE)
def test_final_weights_are_those_of_the_undisturbed_run(runs, fault):
    calm, other = weights(runs["calm"]), weights(runs[fault])
    assert calm.keys() == other.keys()
    assert all(torch.equal(calm[name], other[name]) for name in calm)


@pytest.mark.parametrize("fault", HERE)
def test_no_number_is_missing_doubled_or_different(runs, fault):
    assert series(runs[fault]) == series(runs["calm"])


@pytest.mark.parametrize("fault", HERE)
def test_mlflow_holds_every_step_once_in_one_finished_run(runs, fault):
    from mlflow import MlflowClient

    sync_run(runs[fault])
    client = MlflowClient(f"sqlite:///{runs[fault].parent}/mlflow.db")
    experiment = client.get_experiment_by_name("cvae")
    (run,) = client.search_runs([experiment.experiment_id], f"run_name = '{fault}'")
    assert run.info.status == "FINISHED"
    assert run.data.tags["attempts.train"] == "2"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(5, STEPS + 1, 5))


@pytest.mark.parametrize("fault", HERE)
def test_it_was_disturbed_and_lost_no_more_than_promised(runs, fault):
    attempts = entry(runs[fault], "train")["attempts"]
    assert len(attempts) == 2 and attempts[-1]["state"] == "COMPLETED"
    (at,) = resumed_at(runs[fault])
    if fault in ("signal", "preempt"):
        saved = [
            line
            for line in (runs[fault] / "logs/train/rank0.log").read_text().splitlines()
            if "stopped" in line
        ]
        assert attempts[0]["state"] == "REQUEUED" and f"step {at} of" in saved[-1]
    else:
        assert AT - INTERVAL <= at < STEPS


def test_the_undisturbed_run_was_left_alone(runs):
    assert len(entry(runs["calm"], "train")["attempts"]) == 1 and resumed_at(runs["calm"]) == []

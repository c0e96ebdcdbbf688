"""Trainings on a real Slurm that are disturbed in every way end with the very weights and numbers of one that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real import (
    STEPS,
    TINY,
    entry,
    job_ids,
    kill_rank,
    kill_slurmd,
    launch,
    preempt,
    profile,
    ranks_of,
    requeue,
    resumed_at,
    series,
    step,
    stop_signal,
    wait_for,
    weights,
)

from pipeline.runtime.tracking import sync_run
from slurm.queue import state_of

pytestmark = pytest.mark.slurm
FAULTS = {"signal": stop_signal, "requeue": requeue, "preempt": preempt, "kill_rank": kill_rank, "kill_slurmd": kill_slurmd}
INTERVAL = 20  # steps between checkpoints
AT = 45  # the step from which on a fault strikes


@pytest.fixture(scope="module")
def runs(cluster, noise_celeba, tmp_path_factory) -> dict[str, Path]:
    """One undisturbed training and one per fault, all at the same time, each on nodes of its own."""
    folder = tmp_path_factory.mktemp("faults")
    common = [f"shard.source={noise_celeba}", f"runs_dir={folder}", *TINY]
    # Nodes of Slurm are cheap, cores are not: two ranks each, on two nodes.
    places = {name: [f"n{2 * i + 1}", f"n{2 * i + 2}"] for i, name in enumerate(["calm", *FAULTS])}
    done = launch("--cluster", profile(folder, nodes=1, tasks_per_node=1), "--config", "sigma_cvae_nf", "--stages", "shard", *common)
    assert done.returncode == 0, done.stderr
    wait_for((folder / "sigma_cvae_nf" / "jobs.json").exists, "the shard job")
    wait_for(lambda: entry(folder / "sigma_cvae_nf", "shard")["state"] == "COMPLETED", "shards")
    jobs = {}
    for name in places:
        others = [n for other, place in places.items() if other != name for n in place] + (["n13"] if name != "kill_slurmd" else [])
        on = profile(folder, nodes=2, tasks_per_node=1, extra_sbatch={"exclude": ",".join(others)})
        done = launch("--cluster", on, "--config", "sigma_cvae_nf", "--stages", "train", f"name={name}", *common)
        assert done.returncode == 0, done.stderr
        jobs[name] = job_ids(folder / name, "train")[0]
    for name, fault in FAULTS.items():
        wait_for(lambda name=name: step(folder / name) >= AT, f"{name}: step {AT}")
        assert ranks_of(jobs[name]).keys() == {0, 1}
        fault(cluster, jobs[name], places[name])
    for name, job_id in jobs.items():
        wait_for(lambda job_id=job_id: state_of(job_id) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), f"{name}: end")
        assert state_of(job_id) == "COMPLETED", (name, (folder / name / "jobs.json").read_text())
    cluster.start_node(places["kill_slurmd"][1])
    return {name: folder / name for name in places}


@pytest.mark.parametrize("fault", FAULTS)
def test_final_weights_are_those_of_the_undisturbed_run(runs, fault):
    calm, disturbed = weights(runs["calm"]), weights(runs[fault])
    assert calm.keys() == disturbed.keys()
    assert all(torch.equal(calm[name], disturbed[name]) for name in calm)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_number_is_missing_doubled_or_different(runs, fault):
    assert series(runs[fault]) == series(runs["calm"])


@pytest.mark.parametrize("fault", FAULTS)
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


@pytest.mark.parametrize("fault", FAULTS)
def test_it_was_disturbed_and_lost_no_more_than_promised(runs, fault):
    attempts = entry(runs[fault], "train")["attempts"]
    assert len(attempts) == 2 and attempts[-1]["state"] == "COMPLETED"
    (at,) = resumed_at(runs[fault])
    if fault in ("signal", "requeue", "preempt"):
        saved = [line for line in (runs[fault] / "logs/train/rank0.log").read_text().splitlines() if "stopped" in line]
        assert attempts[0]["state"] == "REQUEUED" and f"step {at} of" in saved[-1]
    else:
        assert AT - INTERVAL <= at < STEPS


def test_the_undisturbed_run_was_left_alone(runs):
    assert len(entry(runs["calm"], "train")["attempts"]) == 1 and resumed_at(runs["calm"]) == []

"""The faults on four ranks, and the real time limit: minutes, so not in CI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real import (
    AT,
    FAULTS,
    INTERVAL,
    STEPS,
    TINY,
    disturbed,
    ended,
    entry,
    job_ids,
    launch,
    profile,
    resumed_at,
    series,
    state_of,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LONG = "train.images=16000"  # 2,000 steps: longer than the time limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("wide")


@pytest.fixture(scope="module")
def runs(cluster, noise_celeba, folder) -> dict[str, Path]:
    """Two nodes with two tasks each."""
    return disturbed(cluster, folder, noise_celeba, FAULTS, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_four_ranks_end_with_the_very_weights_and_numbers(runs, fault):
    calm, other = weights(runs["calm"]), weights(runs[fault])
    assert calm.keys() == other.keys() and all(torch.equal(calm[name], other[name]) for name in calm)
    assert series(runs[fault]) == series(runs["calm"])
    resumed = resumed_at(runs[fault])
    assert resumed and all(AT - INTERVAL <= step < STEPS for step in resumed)


def test_the_time_limit_loses_nothing(runs, noise_celeba, folder):
    """Two minutes of limit, a minute of warning; the undisturbed run has an hour."""
    words = [
        "--config",
        "sigma_cvae_nf",
        "--stages",
        "train",
        f"shard.source={noise_celeba}",
        f"runs_dir={folder}",
        *TINY,
        LONG,
    ]
    limits = {"limited": {"timeout_min": 2, "signal_delay_s": 60}, "unlimited": {"timeout_min": 60}}
    for name, limit in limits.items():
        done = launch(
            "--cluster", profile(folder, nodes=2, tasks_per_node=2, **limit), *words, f"name={name}"
        )
        assert done.returncode == 0, done.stderr
    for name in limits:
        wait_for(lambda name=name: ended(job_ids(folder / name, "train")[0]), name, 900)
        assert state_of(job_ids(folder / name, "train")[0]) == "COMPLETED"
    attempts = entry(folder / "limited", "train")["attempts"]
    print(f"time limit: {len(attempts)} attempts, went on at steps {resumed_at(folder / 'limited')}")
    assert len(attempts) > 1 and {attempt["state"] for attempt in attempts[:-1]} == {"REQUEUED"}
    calm, other = weights(folder / "unlimited"), weights(folder / "limited")
    assert all(torch.equal(calm[name], other[name]) for name in calm)
    assert series(folder / "limited") == series(folder / "unlimited")

"""The chain on a real Slurm: from CelebA files to MLflow, dependent jobs, and the submitted code."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from real import ROOT, TINY, ended, entry, job_ids, launch, profile, states, tool, wait_for

from slurm import ledger
from slurm.queue import job_states, state_of

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def chain(cluster, noise_celeba, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A sweep of two seeds, each on two nodes, with the shards in two parts."""
    folder = tmp_path_factory.mktemp("chain with a space")
    one = {"nodes": 1, "tasks_per_node": 1}
    on = profile(
        folder, nodes=2, tasks_per_node=1, stages={"shard": {"jobs": 2}, "classifier": one, "eval": one}
    )
    short = [word for word in TINY if not word.startswith("train.images")] + ["train.images=320"]
    (folder / "two.yaml").write_text("configs: [sigma_cvae_nf]\nseeds: [0, 1]\n")
    sweep = [
        "--sweep",
        folder / "two.yaml",
        f"shard.source={noise_celeba}",
        f"runs_dir={folder}/runs",
        *short,
    ]
    done = launch("--cluster", on, *sweep, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "sigma_cvae_nf-s0", done


def test_every_stage_ran_once_and_ended_well(chain):
    run_dir, _ = chain
    jobs = json.loads((run_dir / "jobs.json").read_text())
    assert [job["stage"] for job in jobs] == [
        "shard",
        "shard",
        "shard",
        "train",
        "classifier",
        "eval",
        "finish",
    ]
    assert {job["state"] for job in jobs} == {"COMPLETED"} and {len(job["attempts"]) for job in jobs} == {1}
    wait_for(
        lambda: all(ended(job["id"]) for job in jobs), "the end of all jobs"
    )  # the last one has said all, but may still be leaving
    assert set(job_states([job["id"] for job in jobs]).values()) == {"COMPLETED"}
    other = json.loads((run_dir.with_name("sigma_cvae_nf-s1") / "jobs.json").read_text())
    assert [job["stage"] for job in other] == ["train", "eval", "finish"] and {
        job["state"] for job in other
    } == {"COMPLETED"}
    assert [job["id"].partition("_")[2] for job in other] == [
        "1",
        "1",
        "",
    ]  # the second task of an array, the same finishing job
    assert [job["after"] for job in other[1:2]] == [
        f"afterok:{jobs[4]['id']},aftercorr:{jobs[3]['id'].partition('_')[0]}"
    ]


def test_following_says_what_happened_and_ends_with_a_summary(chain):
    _, done = chain
    for said in ("sigma_cvae_nf-s0 train: RUNNING", "sigma_cvae_nf-s1 eval: COMPLETED", "40/40", "finish"):
        assert said in done.stdout


def test_a_sweep_ends_with_a_table_over_seeds_also_in_mlflow(chain):
    from mlflow import MlflowClient

    run_dir, _ = chain
    folder = run_dir.parent / "_sweeps" / "two"
    rows = [
        line
        for line in (folder / "table.md").read_text().splitlines()
        if line.startswith("| sigma_cvae_nf |")
    ]
    assert len(rows) == 1 and rows[0].startswith("| sigma_cvae_nf | 2 |") and "±" in rows[0]
    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    (run,) = client.search_runs(
        [client.get_experiment_by_name("cvae").experiment_id], "run_name = 'sweep two'"
    )
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "table.md",
        "table.html",
        "comparison.html",
    }


def test_ranks_on_two_nodes_trained(chain):
    run_dir, _ = chain
    assert json.loads((run_dir / "train" / "done.json").read_text())["world_size"] == 2
    assert len(entry(run_dir, "train")["attempts"][0]["hosts"]) == 2


def test_shards_made_by_an_array_are_those_of_one_process(chain, noise_celeba, tmp_path):
    run_dir, _ = chain
    from pipeline.config.load import dump, load
    from pipeline.data.manifest import read_manifest
    from pipeline.run import run_stage
    from pipeline.rundir import layout

    config = load([run_dir / "config.yaml"])
    alone = replace(config, runs_dir=str(tmp_path))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text(dump(alone))
    run_stage(tmp_path / "alone", "shard")
    assert read_manifest(layout.shards_dir(config)) == read_manifest(layout.shards_dir(alone))
    journals = sorted(file.name for file in layout.shards_dir(config).glob("journal-*"))
    assert journals == ["journal-0-of-2.jsonl", "journal-1-of-2.jsonl"]


def test_mlflow_has_the_run_with_its_evaluation(chain):
    from mlflow import MlflowClient

    run_dir, _ = chain
    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("cvae").experiment_id])
    (parent,) = [run for run in found if run.info.run_name == run_dir.name]
    assert (
        parent.info.status == "FINISHED"
        and sum(r.data.tags.get("mlflow.parentRunId") == parent.info.run_id for r in found) == 1
    )
    assert parent.data.tags["stage.eval"] == "COMPLETED" and "distance" in parent.data.metrics


def test_complete_stages_are_not_submitted_again(chain):
    run_dir, _ = chain
    again = launch("--run-dir", run_dir, "--dry-run")
    for stage in ("shard", "train", "classifier"):
        assert f"sigma_cvae_nf-s0: {stage}: complete already" in again.stdout
    assert again.stdout.count("#!/bin/bash") == 1


# ---- dependents, with stages that need no torch


def test_dependent_runs_after_a_parent_that_ends_well(submit_pair):
    run_dir = submit_pair("StandIn")
    assert states(run_dir) == {"train": "COMPLETED", "eval": "COMPLETED", "finish": "COMPLETED"}


def test_a_users_mistake_is_not_tried_again_and_its_dependent_does_not_wait_for_ever(submit_pair):
    run_dir = submit_pair("BadData")
    assert states(run_dir) == {"train": "FAILED", "eval": "CANCELLED", "finish": "COMPLETED"}
    train = entry(run_dir, "train")
    assert (train["state"], len(train["attempts"]), train.get("crashes")) == ("FAILED", 1, None)
    assert entry(run_dir, "eval")["state"] == "CANCELLED"  # told by Slurm, written by the finishing job
    failure = ledger.failure(run_dir, "train")
    assert failure and failure["message"] == "shards/00003.tar: damaged; run the shard stage again"


def test_a_stopped_parent_is_requeued_and_its_dependent_waits(submit_pair, cluster):
    run_dir = submit_pair("StopsOnce")
    wait_for(
        lambda: (run_dir / "rank1.0.json").exists() and (run_dir / "rank0.0.json").exists(), "both ranks"
    )
    cluster.run("scancel", "--signal=USR2", job_ids(run_dir, "train")[0])
    assert states(run_dir) == {"train": "COMPLETED", "eval": "COMPLETED", "finish": "COMPLETED"}
    assert [attempt["state"] for attempt in entry(run_dir, "train")["attempts"]] == ["REQUEUED", "COMPLETED"]


def test_a_crashed_parent_is_restarted_and_its_dependent_waits(submit_pair):
    run_dir = submit_pair("KilledOnce")
    assert states(run_dir) == {"train": "COMPLETED", "eval": "COMPLETED", "finish": "COMPLETED"}
    train = entry(run_dir, "train")
    assert [attempt["state"] for attempt in train["attempts"]] == ["CRASHED", "COMPLETED"] and len(
        train["crashes"]
    ) == 1


@pytest.mark.slow  # two crashes, each a start of its own
def test_a_crash_loop_ends_with_the_reason(submit_pair):
    run_dir = submit_pair("Killed", max_crashes=2)
    assert states(run_dir) == {"train": "FAILED", "eval": "CANCELLED", "finish": "COMPLETED"}
    assert entry(run_dir, "train")["state"] == "FAILED" and len(entry(run_dir, "train")["crashes"]) == 2
    failure = ledger.failure(run_dir, "train")
    assert failure and failure["message"].startswith("2 crashes in a row without progress (at 0)")


def test_a_cancelled_parent_stays_cancelled_and_takes_its_dependent_along(submit_pair, cluster):
    run_dir = submit_pair("StopsOnce")
    wait_for(lambda: (run_dir / "rank0.0.json").exists(), "rank 0")
    cluster.run("scancel", job_ids(run_dir, "train")[0])
    assert states(run_dir) == {"train": "CANCELLED", "eval": "CANCELLED", "finish": "COMPLETED"}
    assert entry(run_dir, "train")["state"] == "CANCELLED" and "crashes" not in entry(run_dir, "train")


# ---- sites with --export=NONE


def test_a_site_that_exports_nothing_runs_jobs_with_the_setup_of_the_script(submit_pair):
    run_dir = submit_pair("StandIn", extra_sbatch={"export": "NONE"}, setup=[f"export PYTHONPATH={HERE}"])
    assert states(run_dir) == {"train": "COMPLETED", "eval": "COMPLETED", "finish": "COMPLETED"}


def test_an_error_before_the_stage_reaches_the_user(submit_pair):
    """The module of the pickled job cannot be imported: submitit fails before the stage is entered."""
    run_dir = submit_pair("StandIn", max_crashes=1, setup=["unset PYTHONPATH"])
    assert states(run_dir)["train"] == "FAILED"
    failure = ledger.failure(run_dir, "train")
    assert failure and "ModuleNotFoundError: No module named 'stand_in_jobs'" in failure["message"]
    assert "stand_in_jobs" in tool("status.py", run_dir).stdout


# ---- the submitted code


def test_a_queued_job_runs_the_code_that_was_submitted(cluster, noise_celeba, tmp_path):
    copy = tmp_path / "code"
    for part in ("cvae", "pipeline", "slurm", "configs", "tools"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", copy)
    on = profile(tmp_path, nodes=1, tasks_per_node=1, extra_sbatch={"hold": "true"})
    config = [
        "--config",
        copy / "configs" / "sigma_cvae_nf.yaml",
        f"runs_dir={tmp_path}/runs",
        f"shard.source={noise_celeba}",
    ]
    done = launch("--cluster", on, *config, "shard.size=16", "--stages", "shard", root=copy)
    assert done.returncode == 0, done.stderr
    (copy / "pipeline" / "stages" / "shard.py").write_text(
        "raise SystemExit('edited after the submission')\n"
    )
    (job_id,) = job_ids(tmp_path / "runs" / "sigma_cvae_nf", "shard")
    cluster.run("scontrol", "release", job_id)
    wait_for(lambda: ended(job_id), "the shard job")
    assert state_of(job_id) == "COMPLETED"

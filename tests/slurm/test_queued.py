"""A second launch leaves alone what is queued or running: planning alone, then a real Slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from real import job_ids, launch, profile, tool

from pipeline.config.load import dump
from pipeline.errors import ConfigError
from slurm.chain import Chain, Run, parse_stages, plan
from slurm.executors import executor_named

# Every job and array task that sbatch has handed out waits, but for those with a file gone.<id>.
SQUEUE = """#!/bin/sh
cd "$(dirname "$0")"
for id in $(seq 12 $((11 + $(cat ids | wc -l)))); do
  for job in $id ${id}_0 ${id}_1 ${id}_2 ${id}_3; do
    [ -e gone.$job ] || echo "$job|PENDING"
  done
done
"""


@pytest.fixture
def queue(fake_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `fake_slurm`, with a squeue; to save time, jobs get no copy of the code."""
    monkeypatch.setattr("slurm.executors.cluster.snapshot", lambda place: fake_slurm)
    (fake_slurm / "squeue").write_text(SQUEUE)
    for name in ("sacct", "scontrol"):
        (fake_slurm / name).write_text("#!/bin/sh\nexit 1\n")
    for name in ("squeue", "sacct", "scontrol"):
        (fake_slurm / name).chmod(0o755)
    return fake_slurm


def runs_named(run: Run, *names: str, **cluster: object) -> list[Run]:
    """Runs on the same data, launched before (they have a config.yaml)."""
    config = replace(run.config, cluster=replace(run.config.cluster, **cluster))
    config = replace(config, shard=replace(config.shard, source="/celeba"))
    found = []
    for seed, name in enumerate(names):
        one = Run(replace(config, name=name, seed=seed), run.run_dir.parent / name)
        one.run_dir.mkdir(exist_ok=True)
        (one.run_dir / "config.yaml").write_text(dump(one.config))
        found.append(one)
    return found


def submit(runs: list[Run], stages: str | None = None) -> tuple[Chain, list[str]]:
    """Launch without the checks of a launch; return what was left to do and the new ids."""
    executor = executor_named("slurm")
    chain = executor.without_queued(runs, plan(runs, parse_stages(stages)))
    return chain, executor.submit_all(chain, runs)


def stages_of(chain: Chain) -> list[str]:
    return [step.name for step in chain.steps]


def dependency_of(folder: Path, job_id: str) -> str:
    """What sbatch was asked to wait for."""
    (script,) = folder.rglob(f"{job_id}_submission.sh")
    (line,) = [text for text in script.read_text().splitlines() if "--dependency" in text]
    return line.partition("=")[2].strip("'")


def test_the_same_launch_twice_submits_nothing_and_names_the_jobs(slurm_run, queue):
    runs = runs_named(slurm_run, "a")
    _, first = submit(runs)
    assert first == ["12", "13", "14", "15", "16"]
    chain, second = submit(runs)
    assert second == [] and chain.steps == []
    assert chain.notes == [
        f"a: {stage}: job {number} does it already (PENDING)"
        for number, stage in zip(first, ("shard", "train", "classifier", "eval"), strict=False)
    ]


def test_what_has_ended_is_submitted_again_after_what_is_queued(slurm_run, queue):
    runs = runs_named(slurm_run, "a")
    submit(runs)
    (queue / "gone.15").touch()
    chain, new = submit(runs)
    assert stages_of(chain) == ["a-eval"] and new == ["17", "18"]
    assert dependency_of(slurm_run.run_dir.parent, "17") == "afterok:13:14"
    assert dependency_of(slurm_run.run_dir.parent, "18") == "afterany:12:13:14:17"


def test_parts_are_not_made_a_second_time(slurm_run, queue):
    runs = runs_named(slurm_run, "a", stages={"shard": {"jobs": 3}})
    submit(runs)
    chain, new = submit(runs, "shard,train")
    assert chain.steps == [] and new == []
    fewer = runs_named(slurm_run, "a", stages={"shard": {"jobs": 2}})
    assert submit(fewer, "shard")[0].steps == []


def test_another_run_waits_for_the_shared_jobs_of_the_first(slurm_run, queue):
    submit(runs_named(slurm_run, "a"))
    chain, new = submit(runs_named(slurm_run, "b"))
    assert stages_of(chain) == ["b-train", "b-eval"] and len(new) == 3
    assert dependency_of(slurm_run.run_dir.parent, new[0]) == "afterok:12"
    assert dependency_of(slurm_run.run_dir.parent, new[1]) == "afterok:17:14"


def test_a_sweep_grows_and_never_waits_for_a_task_that_failed(slurm_run, queue):
    submit(runs_named(slurm_run, "a", "b", "c"), "shard,train")
    assert submit(runs_named(slurm_run, "a", "b", "c"), "shard,train")[1] == []
    (queue / "gone.13_0").touch()
    chain, new = submit(runs_named(slurm_run, "a", "b", "c"), "train,eval")
    assert stages_of(chain) == ["a-train", "a-eval", "b-eval", "c-eval"]
    assert dependency_of(slurm_run.run_dir.parent, new[1]) == "afterok:15"
    assert dependency_of(slurm_run.run_dir.parent, new[2].partition("_")[0]) == "afterok:13_1:13_2"


def test_evaluations_wait_task_by_task_for_queued_trainings(slurm_run, queue):
    submit(runs_named(slurm_run, "a", "b"), "shard,train,classifier")
    chain, new = submit(runs_named(slurm_run, "a", "b"))
    assert stages_of(chain) == ["a-eval", "b-eval"]
    assert dependency_of(slurm_run.run_dir.parent, new[0].partition("_")[0]) == "afterok:14,aftercorr:13"


def test_two_launches_of_one_run_each_get_a_common_end(slurm_run, queue):
    submit(runs_named(slurm_run, "a"))
    submit(runs_named(slurm_run, "b"))
    chain, new = submit([*runs_named(slurm_run, "a"), *runs_named(slurm_run, "b")])
    assert chain.steps == [] and len(new) == 1  # the comparison of both


def test_other_settings_than_those_of_a_queued_job_are_refused(slurm_run, queue):
    (run,) = runs_named(slurm_run, "a")
    submit([run], "shard,train")
    more = replace(run, config=replace(run.config, eval=replace(run.config.eval, n=7)))
    assert stages_of(submit([more])[0]) == ["a-classifier", "a-eval"]  # only the evaluation reads the key
    longer = replace(run, config=replace(run.config, train=replace(run.config.train, images=9)))
    with pytest.raises(ConfigError, match=r"job 13 \(train, PENDING\).*train.images: 150000 -> 9.*cancel.py"):
        submit([longer])


def test_evaluations_with_other_settings_stand_beside_each_other(slurm_run, queue):
    (run,) = runs_named(slurm_run, "a")
    more = replace(run, evaluates_only=True)
    more = replace(more, config=replace(run.config, eval=replace(run.config.eval, n=7)))
    assert len(submit([run], "eval")[1]) == 2
    assert len(submit([more], "eval")[1]) == 2
    assert submit([run], "eval")[1] == []
    assert submit([more], "eval")[1] == []


@pytest.mark.slurm
def test_a_launch_while_its_jobs_are_queued(cluster, noise_celeba, tmp_path):
    on = profile(tmp_path, nodes=1, tasks_per_node=1, extra_sbatch={"hold": "true"})
    source, runs_dir = f"shard.source={noise_celeba}", f"runs_dir={tmp_path}/runs"
    words = ["--cluster", on, "--config", "sigma_cvae_nf", source, runs_dir]
    run_dir = tmp_path / "runs" / "sigma_cvae_nf"
    assert launch(*words).returncode == 0
    first = {stage: job_ids(run_dir, stage) for stage in ("shard", "train", "classifier", "eval", "finish")}

    again = launch(*words)
    assert again.returncode == 0, again.stderr
    for stage in ("shard", "train", "classifier", "eval"):
        assert f"sigma_cvae_nf: {stage}: job {first[stage][0]} does it already (PENDING)" in again.stdout
    assert "jobs: none, everything that was asked for is queued or complete" in again.stdout
    assert {stage: job_ids(run_dir, stage) for stage in first} == first

    cluster.run("scancel", first["eval"][0])
    third = launch(*words)
    assert third.returncode == 0, third.stderr
    assert len(job_ids(run_dir, "eval")) == 2 and job_ids(run_dir, "train") == first["train"]
    assert tool("cancel.py", run_dir).returncode == 0

"""Tests that need no cluster: sweeps, arrays and their dependencies, the decision to restart, the copy
of the code.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from submitit.core.utils import UncompletedJobError

from pipeline.config.load import dump, load
from pipeline.config.sweep import read_sweep, with_command_line
from pipeline.errors import ConfigError, DataError
from pipeline.rundir import layout
from slurm import ledger
from slurm.chain import Run, batches, dependencies, parse_stages, plan
from slurm.preflight import checks
from slurm.queue import time_limit_min
from slurm.restart import wanted
from slurm.sbatch import code, snapshot, snapshot_folder
from slurm.status import as_table, log_of, survey


def sweep(tmp_path: Path, text: str) -> Path:
    (tmp_path / "sweep.yaml").write_text(text)
    return tmp_path / "sweep.yaml"


def test_a_sweep_is_configs_times_grid_times_seeds(tmp_path):
    file = sweep(
        tmp_path,
        "configs: [a, b]\nseeds: [0, 7]\ngrid: {model.z_dim: [8, 16]}\noverrides: {train.images: 100}\n",
    )
    cells = read_sweep(file)
    assert len(cells) == 8
    assert cells[1].config == "a"
    assert cells[1].common == ["train.images=100"]
    assert cells[1].own == ["model.z_dim=8", "seed=7", "name=a-z_dim8-s7"]


def test_the_command_line_wins_over_what_a_sweep_sets_for_all_runs(tmp_path):
    text = "configs: [a]\ngrid: {model.z_dim: [8]}\noverrides: {train.images: 100, train.init_from: x}\n"
    file = sweep(tmp_path, text)
    (cell,) = read_sweep(file)
    given = ["train.images=7"]
    assert load([], with_command_line(cell, given, file)).train.images == 7
    for own in ("model.z_dim=16", "seed=3", "name=mine"):
        with pytest.raises(ConfigError, match=f"override '{own}': the sweep .*sweep.yaml sets"):
            with_command_line(cell, [*given, own], file)


def test_values_of_a_sweep_keep_their_kind(tmp_path):
    text = (
        "configs: [a]\ngrid: {model.net.channels: [[8], [16, 32]]}\n"
        "overrides: {cluster.constraint: null, data.flip: false}\n"
    )
    file = sweep(tmp_path, text)
    configs = [load([], with_command_line(cell, [], file)) for cell in read_sweep(file)]
    assert [config.model.net.channels for config in configs] == [[8], [16, 32]]
    assert [config.name for config in configs] == ["a-channels8-s0", "a-channels16_32-s0"]
    assert configs[0].data.flip is False and configs[0].cluster.constraint is None


@pytest.mark.parametrize(
    "text,said",
    [
        ("seeds: [0]", "expected the keys configs"),
        ("configs: [a]\nseed: [1]", "seed"),
        ("configs: [a]\nseeds: 3", "'seeds'"),
        ("configs: [a]\noverrides: [train.images=5]", "'overrides': got ['train.images=5'], expected keys"),
        (":", "YAML"),
    ],
)
def test_a_wrong_sweep_file_is_named_with_its_key(tmp_path, text, said):
    with pytest.raises(ConfigError, match="sweep.yaml") as error:
        read_sweep(sweep(tmp_path, text))
    assert said in str(error.value)


def several(run: Run, **cluster: object) -> list[Run]:
    """Three runs on the same data."""
    config = replace(run.config, cluster=replace(run.config.cluster, executor="slurm", **cluster))
    config = replace(config, shard=replace(config.shard, source="/celeba"))
    return [Run(replace(config, name=f"r{i}", seed=i), run.run_dir.parent / f"r{i}") for i in range(3)]


def test_arrays_wait_for_each_other_task_by_task_and_for_what_they_share_as_a_whole(run):
    chain = plan(several(run, stages={"shard": {"jobs": 4}}), parse_stages(None))
    groups = batches(chain)
    assert [(group[0].stage, len(group)) for group in groups] == [
        ("shard", 4), ("shard", 1), ("train", 3), ("classifier", 1), ("eval", 3),
    ]  # fmt: skip
    ids, said = {}, []
    for number, group in enumerate(groups, 10):
        said.append(dependencies(group, ids))
        ids |= {
            step.output: f"{number}_{i}" if len(group) > 1 else str(number) for i, step in enumerate(group)
        }
    assert said == [None, "afterok:10", "afterok:11", "afterok:11", "afterok:13,aftercorr:12"]


def test_where_tasks_do_not_correspond_every_one_needed_is_waited_for(run):
    """One training is complete: the evaluations that need the others are an array of their own."""
    runs = several(run)
    done = layout.train_dir(runs[1].run_dir) / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"images": 10**9}))
    groups = batches(plan(runs, ["train", "eval"]))
    assert [[step.run.config.name for step in group] for group in groups] == [
        ["r0", "r2"],
        ["r0", "r2"],
        ["r1"],
    ]


def test_toy_faces_are_drawn_by_one_job(run):
    runs = [Run(replace(r.config, shard=replace(r.config.shard, source="")), r.run_dir) for r in several(run)]
    runs = [
        Run(
            replace(r.config, cluster=replace(r.config.cluster, stages={"shard": {"jobs": 4}})),
            r.run_dir,
        )
        for r in runs
    ]
    assert len(plan(runs, ["shard"]).steps) == 1


def test_only_the_shard_stage_can_be_split(run):
    with pytest.raises(ConfigError, match=r"cluster\.jobs.*train.*only the shard stage"):
        plan(several(run, stages={"train": {"jobs": 2}}), ["train"])


# ---- restarts


@pytest.fixture
def crashing(run: Run) -> Path:
    """A run whose job 5 crashes; its progress is the newest checkpoint."""
    cluster = replace(run.config.cluster, max_crashes=3, max_restarts=5)
    (run.run_dir / "config.yaml").write_text(dump(replace(run.config, cluster=cluster)))
    return run.run_dir


def again(run_dir: Path, code: int) -> bool:
    """Whether the crashed job is restarted."""
    return wanted(run_dir, "train", "5", code, run_dir / "logs/train/submitit/1")


def reach(run_dir: Path, step: int) -> None:
    folder = layout.checkpoints_dir(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step_{step:08d}.json").write_text("{}")


def test_a_crash_is_tried_again_until_it_makes_no_progress(crashing):
    assert again(crashing, 137) and again(crashing, 137)
    reach(crashing, 100)
    assert again(crashing, 1) and again(crashing, 1)  # the first two were elsewhere
    assert not again(crashing, 1)
    failure = ledger.failure(crashing, "train")
    assert failure and failure["message"].startswith("3 crashes in a row without progress (at 100)")
    assert ledger.state(crashing, "train", "5") == "FAILED"


def test_crashes_are_limited_also_with_progress(crashing):
    answers = []
    for step in range(1, 7):
        reach(crashing, step)
        answers.append(again(crashing, 1))
    assert answers == [True] * 5 + [False]


def test_a_users_mistake_is_not_tried_again(crashing):
    ledger.note_failure(crashing, "train", 0, DataError("shards: gone"))
    assert not again(crashing, 2)
    failure = ledger.failure(crashing, "train")
    assert failure and failure["message"] == "shards: gone"


def test_a_job_that_timed_out_too_often_is_not_a_crash(crashing):
    ledger.note_failure(crashing, "train", 0, UncompletedJobError("timed-out too many times"))
    assert not again(crashing, 1)
    failure = ledger.failure(crashing, "train")
    assert failure and "cluster.max_timeouts" in failure["message"]


def test_a_stall_is_a_crash_with_its_own_words_until_the_next_attempt(crashing):
    (crashing / "train").mkdir(exist_ok=True)
    (crashing / "train" / "stall.json").write_text(
        json.dumps({"message": "no answer for 180 s from rank 2", "ranks": [2]})
    )
    assert again(crashing, 75)
    failure = ledger.failure(crashing, "train")
    assert failure and (failure["message"], failure["rank"]) == ("no answer for 180 s from rank 2", 2)
    ledger.forget_failure(crashing, "train")
    assert ledger.failure(crashing, "train") is None


# ---- the copy of the code


def test_the_copy_holds_all_that_a_job_imports_and_is_made_once(tmp_path):
    folder = snapshot(tmp_path.joinpath)
    files = code()
    assert {Path("launch.py"), Path("slurm/job.py"), Path("configs/cluster/slurm.yaml")} <= files.keys()
    assert all((folder / file).read_bytes() == content for file, content in files.items())
    before = (folder / "launch.py").stat().st_mtime_ns
    assert snapshot(tmp_path.joinpath) == folder and (folder / "launch.py").stat().st_mtime_ns == before
    assert snapshot_folder(tmp_path.joinpath, files | {Path("launch.py"): b"edited"}) != folder


# ---- status


def submission(run_dir: Path, executor: str, stage: str) -> ledger.Submission:
    return ledger.Submission(executor, str(run_dir / "logs" / stage / "submitit" / "1"))


@pytest.mark.parametrize(
    "text,minutes",
    [("7-00:00:00", 10080), ("1:30:00", 90), ("30:00", 30), ("infinite", float("inf")), ("", float("inf"))],
)
def test_time_limits_of_partitions(monkeypatch, text, minutes):
    monkeypatch.setattr("slurm.queue.ask", lambda *command: text)
    assert time_limit_min("gpu") == minutes


def test_status_and_log_of_a_run_of_this_machine(crashing):
    ledger.submitted(crashing, "train", "5", submission(crashing, "local", "train"))
    ledger.started(crashing, "train", "5", ["here"])
    (status,) = survey([crashing])
    assert (status.stage, status.state, status.attempt) == ("train", "RUNNING", 1)
    assert log_of(crashing, None, None) == crashing / "logs/train/rank0.log"
    ledger.note_failure(crashing, "train", 1, ZeroDivisionError("the bug"))
    ledger.ended(crashing, "train", "5", "FAILED")
    assert "the bug" in as_table(survey([crashing]))
    assert log_of(crashing, None, None) == crashing / "logs/train/submitit/1/5_1_log.err"


def test_the_log_of_a_job_that_crashed_before_rank_0_was_there(crashing):
    ledger.submitted(crashing, "train", "5", submission(crashing, "slurm", "train"))
    ledger.submitted(crashing, "eval", "6", submission(crashing, "slurm", "eval"))
    ledger.note_failure(crashing, "train", 1, ZeroDivisionError("the bug"))
    ledger.crashed(crashing, "train", "5", 0, 1)
    assert log_of(crashing, None, None) == crashing / "logs/train/submitit/1/5_1_log.err"


def test_the_file_system_of_a_folder_is_that_of_the_deepest_mount_above_it(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "disk / ext4 rw 0 0\nserver:/a /data nfs4 rw 0 0\nserver:/b /my\\040runs\\134x lustre rw 0 0\n"
    )
    monkeypatch.setattr(checks, "MOUNTS", mounts)
    found = [checks.file_system(Path(place)) for place in ("/data/x", "/data2/x", "/my runs\\x/y")]
    assert found == ["nfs4", "ext4", "lustre"]

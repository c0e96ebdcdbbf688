"""Executors: jobs of the real local one, and submissions to a stand-in sbatch."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in_jobs
from PIL import Image
from stand_in_jobs import seen, wait_for
from submitit.slurm.slurm import SlurmExecutor

from pipeline.config.schema import EXECUTOR_NAMES
from pipeline.data.sources.toy.shapes import make_toy_shapes
from pipeline.errors import ConfigError, DataError, UserError
from pipeline.rundir import layout
from slurm import ledger
from slurm.chain import Chain, Run, Step, parse_stages, plan
from slurm.executors import EXECUTORS, executor_named
from slurm.executors.cluster import script_of
from slurm.executors.following import interrupts_held, require_success, terminal_signals_blocked
from slurm.preflight.checks import batch_warnings, source_is_there, walltime_leaves_time
from slurm.resources import stage_resources


def one_step(run: Run, stage: str = "train") -> Chain:
    return Chain([Step(run, stage, run.run_dir / stage, ())], [])


def use(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.job.StageJob", getattr(stand_in_jobs, job))


def run_it(run: Run) -> None:
    executor = executor_named(run.config.cluster.executor)
    executor.run_all(one_step(run), after_each=lambda run_dir: None)


def only_job(run: Run) -> dict:
    jobs = json.loads((run.run_dir / "jobs.json").read_text())
    assert len(jobs) == 1
    return jobs[0]


def failure_of(run_dir: Path) -> dict:
    found = ledger.failure(run_dir, "train")
    assert found is not None
    return found


# Jobs on this machine


def test_ranks_get_their_variables_and_no_ctrl_c(run, monkeypatch):
    use("StandIn", monkeypatch)
    run_it(run)
    sees = [seen(run.run_dir, rank) for rank in (0, 1)]
    assert [s["RANK"] for s in sees] == [s["LOCAL_RANK"] for s in sees] == ["0", "1"]
    assert {(s["WORLD_SIZE"], s["LOCAL_WORLD_SIZE"], s["MASTER_ADDR"]) for s in sees} == {
        ("2", "2", "127.0.0.1")
    }
    assert sees[0]["MASTER_PORT"] == sees[1]["MASTER_PORT"]
    assert not any(s["ctrl_c"] for s in sees)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert only_job(run)["state"] == "COMPLETED"
    assert only_job(run)["attempts"][0]["hosts"]


def test_debug_runs_here_as_one_rank_and_leaves_the_environment_alone(run, monkeypatch):
    use("StandIn", monkeypatch)
    before = dict(os.environ)
    run_it(replace(run, config=replace(run.config, cluster=replace(run.config.cluster, executor="debug"))))
    sees = seen(run.run_dir, 0)
    assert (sees["pid"], sees["RANK"], sees["WORLD_SIZE"]) == (os.getpid(), "0", "1")
    assert dict(os.environ) == before
    assert only_job(run)["state"] == "COMPLETED"


def test_preempted_job_is_requeued_and_goes_on(run, monkeypatch):
    """USR2 reaches every rank, as under Slurm. Each saves, rank 0 requeues, and no rank leaves an error."""
    use("StopsOnce", monkeypatch)
    (job,) = executor_named("local").submit(one_step(run).steps)
    wait_for(lambda: all((run.run_dir / f"rank{rank}.0.json").exists() for rank in (0, 1)))
    for rank in (0, 1):
        os.kill(seen(run.run_dir, rank)["pid"], signal.SIGUSR2)
    wait_for(job.done)
    assert [(run.run_dir / f"resumed.{rank}").read_text() for rank in (0, 1)] == ["39", "39"]
    assert [attempt["state"] for attempt in only_job(run)["attempts"]] == ["REQUEUED", "COMPLETED"]
    assert ledger.failure(run.run_dir, "train") is None
    require_success(job, one_step(run).steps[0])
    assert "Requeued job" in job.task(0).paths.stderr.read_text() + job.task(0).paths.stdout.read_text()


def test_ctrl_c_stops_the_job_without_requeue(run, monkeypatch, capsys):
    use("PressesCtrlC", monkeypatch)
    monkeypatch.setenv("TEST_LAUNCHER", str(os.getpid()))
    after: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        executor_named("local").run_all(one_step(run), after_each=after.append)
    assert [attempt["state"] for attempt in only_job(run)["attempts"]] == ["CANCELLED"]
    assert after == [run.run_dir]
    assert "stopping" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_right_after_the_start_stops_the_job(run, monkeypatch):
    """The job is recorded, but nobody watches it yet."""
    use("StopsOnce", monkeypatch)
    submitted = ledger.submitted

    def interrupted(*args: object) -> None:
        submitted(*args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ledger, "submitted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_it(run)
    assert ledger.alive(only_job(run)["process"]) is False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_processes_start_is_heard_by_the_launcher_alone():
    says = "import signal; print(signal.SIGINT in signal.pthread_sigmask(0, []))"
    with interrupts_held() as release:
        with terminal_signals_blocked():
            os.kill(os.getpid(), signal.SIGINT)
            child = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True)
        with pytest.raises(KeyboardInterrupt):
            release()
    assert child.stdout == "True\n"


def test_a_run_that_another_launch_trains_is_left_alone(run):
    launcher, chain = executor_named("local"), one_step(run)
    other = ledger.process(os.getppid())
    ledger.submitted(run.run_dir, "train", "7", ledger.Submission("local", "first", process=other))
    with pytest.raises(ConfigError, match=f"is being trained by job 7, process {other['pid']} on .*cancel"):
        launcher.check([run], chain, preflight=False)
    assert launcher.check([replace(run, evaluates_only=True)], chain, preflight=False) == []
    dead = {**other, "started": 0}
    ledger.submitted(run.run_dir, "train", "7", ledger.Submission("local", "first", process=dead))
    assert launcher.check([run], chain, preflight=False) == []
    ledger.submitted(run.run_dir, "train", "7", ledger.Submission("local", "first", process=other))
    ledger.ended(run.run_dir, "train", "7", "CANCELLED")
    assert launcher.check([run], chain, preflight=False) == []


def test_a_process_id_that_comes_again_is_another_job(run):
    """Else a job that died before it began would count as completed."""
    for logs in ("1", "2"):
        ledger.submitted(run.run_dir, "train", "7", ledger.Submission("local", logs))
        assert ledger.state(run.run_dir, "train", "7") == "SUBMITTED"
        ledger.started(run.run_dir, "train", "7", ["here"])
        ledger.ended(run.run_dir, "train", "7", "COMPLETED")
    jobs = json.loads((run.run_dir / "jobs.json").read_text())
    assert [(job["logs"], len(job["attempts"])) for job in jobs] == [("1", 1), ("2", 1)]


def test_a_local_job_is_warned_as_long_before_its_limit_as_asked(run, monkeypatch):
    asked: dict[str, object] = {}

    def controller(**settings: object) -> None:
        asked.update(settings)
        raise OSError("not started")

    monkeypatch.setattr("submitit.local.local.start_controller", controller)
    limited = with_cluster(run, timeout_min=60, signal_delay_s=77)
    with pytest.raises(OSError, match="not started"):
        executor_named("local").submit(one_step(limited).steps)
    assert (asked["timeout_min"], asked["signal_delay_s"]) == (60, 77)
    late = with_cluster(run, timeout_min=1, signal_delay_s=9, stages={"train": {"signal_delay_s": 60}})
    (said,) = walltime_leaves_time(late)
    assert said.fatal and said.text.startswith("key 'cluster.signal_delay_s' for stage train: 60 s")


def test_a_users_mistake_on_any_rank_is_the_one_message(run, monkeypatch):
    use("BadData", monkeypatch)
    with pytest.raises(UserError, match="^shards/00003.tar: damaged; run the shard stage again$"):
        run_it(run)
    assert failure_of(run.run_dir)["kind"] == "DataError"
    assert only_job(run)["state"] == "FAILED"

    use("StandIn", monkeypatch)  # a later attempt that succeeds forgets the error
    run_it(run)
    assert not (run.run_dir / "logs/train/error.json").exists()


def test_a_bug_shows_the_log_of_the_rank_that_has_it(run, monkeypatch):
    use("Bug", monkeypatch)
    with pytest.raises(SystemExit, match="failed on rank 1") as ended:
        run_it(run)
    assert "ZeroDivisionError: the very bug" in str(ended.value)
    assert "_1_log.err" in str(ended.value)


def test_a_killed_job_is_a_failure(run, monkeypatch):
    use("Killed", monkeypatch)
    with pytest.raises(SystemExit, match=re.escape("ranks [0, 1] ended without a result")):
        run_it(run)
    assert only_job(run)["state"] == "FAILED"


def test_a_refused_second_launch_is_no_failure_of_the_first(tmp_path):
    ledger.note_failure(tmp_path, "train", 0, DataError("is being trained by job 1"), "2")
    assert ledger.failed_for_s(tmp_path, "train", "1") == 0  # so its ranks are not killed
    assert ledger.failed_for_s(tmp_path, "train", "2") > 0
    assert ledger.failure(tmp_path, "train", "1") is None
    ledger.note_failure(tmp_path, "train", 0, ValueError("a crash of the first"), "1")
    found = ledger.failure(tmp_path, "train", "1")
    assert found and found["message"] == "a crash of the first" and not found["user"]


def test_the_most_telling_error_is_kept(tmp_path):
    ledger.note_failure(tmp_path, "train", 0, RuntimeError("Connection closed by peer"))
    ledger.note_failure(tmp_path, "train", 2, ValueError("first"))
    ledger.note_failure(tmp_path, "train", 3, ValueError("second"))
    assert failure_of(tmp_path)["rank"] == 2
    ledger.note_failure(tmp_path, "train", 1, DataError("file: bad"))
    ledger.note_failure(tmp_path, "train", 0, RuntimeError("Connection closed by peer"))
    assert failure_of(tmp_path)["message"] == "file: bad"


# The chain


def test_stages_keep_their_order_and_a_wrong_name_gets_the_nearest():
    assert parse_stages("eval,train") == ["train", "eval"]
    with pytest.raises(ConfigError, match="did you mean 'classifier'"):
        parse_stages("train,clasifier")


def test_two_runs_share_shards_and_classifier(run):
    other = Run(replace(run.config, name="other", seed=1), run.run_dir.parent / "other")
    chain = plan([run, other], parse_stages(None))
    assert [step.name for step in chain.steps] == [
        "trial-shard", "trial-train", "trial-classifier", "trial-eval", "other-train", "other-eval",
    ]  # fmt: skip
    by_name = {step.name: step for step in chain.steps}
    assert by_name["other-train"].after == (by_name["trial-shard"].output,)
    assert set(by_name["other-eval"].after) == {
        by_name["other-train"].output,
        by_name["trial-classifier"].output,
    }
    reseeded = Run(replace(other.config, shard=replace(other.config.shard, seed=9)), other.run_dir)
    assert "other-shard" in [step.name for step in plan([run, reseeded], parse_stages(None)).steps]


def test_complete_stages_are_left_out(run):
    manifest = layout.shards_dir(run.config) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    chain = plan([run], ["shard", "train"])
    assert [step.stage for step in chain.steps] == ["train"]
    assert chain.steps[0].after == ()
    assert chain.notes == ["trial: shard: complete already"]


def test_settings_that_the_executor_cannot_fulfil(run):
    cluster = run.config.cluster
    with pytest.raises(ConfigError, match="cluster.nodes.*train.*got 2"):
        stage_resources(replace(run.config, cluster=replace(cluster, nodes=2)), "train")
    with pytest.raises(ConfigError, match="cluster.cpus_per_task.*got 0"):
        stage_resources(replace(run.config, cluster=replace(cluster, cpus_per_task=0)), "train")
    notes = plan(
        [replace(run, config=replace(run.config, cluster=replace(cluster, partition="gpu")))], ["train"]
    ).notes
    assert notes == ["trial: executor 'local' does not use cluster.partition"]


# Slurm


def test_dry_run_prints_what_a_submission_writes(slurm_run, fake_slurm):
    step = one_step(slurm_run).steps[0]
    foretold = script_of([step], "afterok:7:8")
    (job,) = executor_named("slurm").submit([step], "afterok:7:8")
    assert foretold == job.paths.submission_file.read_text()
    assert "%j" in foretold and job.job_id == "12"
    for line in (
        "#SBATCH --dependency=afterok:7:8", "#SBATCH --kill-on-invalid-dep=yes", "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4", "#SBATCH --mem=64GB", "#SBATCH --time=300",
        "#SBATCH --partition=gpu", "#SBATCH --account=me", "#SBATCH --qos=high", "#SBATCH --constraint=a100",
        "#SBATCH --reservation='my course'", "#SBATCH --exclusive", "module load cuda",
    ):  # fmt: skip
        assert line in foretold.splitlines()
    assert foretold.index("trap restart_after_crash") < foretold.index("module load cuda")  # it may exit
    command = foretold.rstrip().splitlines()[-1]
    assert (
        "--kill-on-bad-exit=1 --cpus-per-task=6 --export=ALL "
        "apptainer exec --nv my.sif python -u -m submitit.core._submit" in command
    )


def test_chain_on_slurm_depends_by_job_id(slurm_run, fake_slurm, monkeypatch, capsys):
    for name in ("SLURM_CPU_BIND", "PMIX_RANK", "MASTER_PORT"):  # as inside a job
        monkeypatch.setenv(name, "7")
    executor_named("slurm").submit_all(plan([slurm_run], parse_stages(None)), [slurm_run])
    jobs = {job["stage"]: job for job in json.loads((slurm_run.run_dir / "jobs.json").read_text())}
    assert {stage: (job["id"], job["after"]) for stage, job in jobs.items()} == {
        "shard": ("12", ""), "train": ("13", "afterok:12"), "classifier": ("14", "afterok:12"),
        "eval": ("15", "afterok:13:14"),
        "finish": ("16", "afterany:12:13:14:15"),
    }  # fmt: skip
    text = (Path(jobs["eval"]["logs"]) / "15_submission.sh").read_text()
    assert "afterok:13:14" in text
    inherited = (fake_slurm / "env.13").read_text()
    assert not re.search(
        "^(SLURM_(?!CONF=)|PMIX_|MASTER_)", inherited, re.MULTILINE
    )  # which cluster to ask is no part of a job
    assert os.environ["PMIX_RANK"] == "7"
    assert "trial-eval: job 15, afterok:13:14" in capsys.readouterr().out


def test_shard_is_one_task_without_gpu(slurm_run, fake_slurm):
    text = script_of(one_step(slurm_run, "shard").steps, None)
    assert "#SBATCH --ntasks-per-node=1" in text and "#SBATCH --nodes=1" in text
    assert "gpus" not in text and "dependency" not in text and "invalid-dep" not in text


def with_cluster(run: Run, **cluster: object) -> Run:
    return replace(run, config=replace(run.config, cluster=replace(run.config.cluster, **cluster)))


def script_lines(run: Run, stage: str) -> list[str]:
    return script_of(one_step(run, stage).steps, None).splitlines()


@pytest.mark.parametrize(
    ("gpus", "line"),
    [
        (4, "#SBATCH --gpus-per-node=4"),
        ("a100:4", "#SBATCH --gpus-per-node=a100:4"),
        ("1g.10gb:2", "#SBATCH --gpus-per-node=1g.10gb:2"),
        ("gpu:4", "#SBATCH --gres=gpu:4"),
        ("gpu:a100:4", "#SBATCH --gres=gpu:a100:4"),
        ("gpu:a100", "#SBATCH --gres=gpu:a100:1"),
        ("gpu", "#SBATCH --gres=gpu:1"),
    ],
)
def test_gpus_may_have_a_type_and_be_a_gres(slurm_run, gpus, line):
    lines = script_lines(with_cluster(slurm_run, gpus_per_node=gpus, tasks_per_node=1), "train")
    assert [found for found in lines if "gpus-per-node" in found or "gres" in found] == [line]


def test_auto_is_for_this_machine(slurm_run, fake_slurm):
    run = with_cluster(slurm_run, gpus_per_node="auto")
    with pytest.raises(ConfigError, match="cluster.gpus_per_node.*'auto'"):
        executor_named("slurm").check([run], one_step(run), preflight=False)


def test_stages_without_a_gpu_inherit_nothing_of_the_gpu_jobs(slurm_run):
    options = {"gres": "gpu:1", "mem_per_gpu": "8G", "tres-per-task": "gres/gpu:1", "reservation": "mine"}
    run = with_cluster(slurm_run, extra_sbatch=options)
    for stage in ("shard", "finish"):
        text = "\n".join(script_lines(run, stage))
        for word in ("gres", "gpu:", "gpus-per", "per-gpu", "--mem", "--constraint"):
            assert word not in text, word
        assert "--reservation=mine" in text and "--account=me" in text
    own = {"shard": {"mem_gb": 7, "constraint": "cpu", "extra_sbatch": {"mem-per-gpu": "1G"}}}
    text = "\n".join(script_lines(with_cluster(run, stages=own), "shard"))
    assert "--mem=7GB" in text and "--constraint=cpu" in text and "--mem-per-gpu=1G" in text


def test_stages_without_a_gpu_keep_the_other_resources_of_a_gres(slurm_run):
    options = {
        "gres": "gpu:a100:4,tmpfs:100G",
        "tres-per-task": "gres/gpu:1",
        "tres-bind": "gres/gpu:closest",
    }
    lines = script_lines(with_cluster(slurm_run, extra_sbatch=options), "shard")
    assert [line for line in lines if "gres" in line or "tres" in line] == ["#SBATCH --gres=tmpfs:100G"]
    own = {"shard": {"extra_sbatch": {"gres": None, "requeue": None}}}
    text = "\n".join(script_lines(with_cluster(slurm_run, extra_sbatch=options, stages=own), "shard"))
    assert "gres" not in text and "#SBATCH --requeue" not in text


def test_an_option_of_sbatch_is_the_same_in_every_spelling(slurm_run):
    run = with_cluster(slurm_run, extra_sbatch={"mem_per_gpu": "8G", "--gpus_per_node": "a100:2"})
    lines = script_lines(run, "train")
    assert [line for line in lines if "per-gpu" in line] == ["#SBATCH --mem-per-gpu=8G"]
    assert [line for line in lines if "gpus-per-node" in line] == ["#SBATCH --gpus-per-node=a100:2"]
    own = {"eval": {"extra_sbatch": {"mem-per-gpu": None, "gpus-per-node": None}}}
    text = "\n".join(script_lines(with_cluster(run, stages=own), "eval"))
    assert "per-gpu" not in text and "gpus-per-node" not in text


def test_every_key_can_be_set_per_stage_and_null_resets_it(slurm_run):
    own = {
        "setup": ["module load other"], "python": None, "signal_delay_s": 30, "qos": None,
        "extra_sbatch": {"exclusive": None, "nice": "5"},
    }  # fmt: skip
    lines = script_lines(with_cluster(slurm_run, stages={"eval": own}), "eval")
    for line in ("module load other", "#SBATCH --signal=USR2@30", "#SBATCH --nice=5"):
        assert line in lines
    assert "#SBATCH --reservation='my course'" in lines  # inherited
    text = "\n".join(lines)
    for word in ("--exclusive", "--qos", "module load cuda", "apptainer"):
        assert word not in text, word


def test_a_work_key_is_submitted_only_if_asked_for(slurm_run):
    assert "wckey" not in "\n".join(script_lines(slurm_run, "train"))
    asked = with_cluster(slurm_run, extra_sbatch={"wckey": "project"})
    assert "#SBATCH --wckey=project" in script_lines(asked, "train")


def test_a_cluster_that_does_not_answer_is_one_sentence(slurm_run, fake_slurm, monkeypatch):
    monkeypatch.setattr("slurm.preflight.ask", lambda *command: None)
    with pytest.raises(ConfigError) as refused:
        executor_named("slurm").check([slurm_run], one_step(slurm_run), preflight=True)
    assert str(refused.value).startswith("Slurm does not answer") and "\n" not in str(refused.value)


def test_a_small_share_of_a_gpu_is_a_warning(run):
    batch = replace(run.config, train=replace(run.config.train, batch_size=64))
    assert batch_warnings(batch, 2, on_gpus=True) == []
    (said,) = batch_warnings(batch, 4, on_gpus=True)
    assert "64 images over 4 GPUs are 16 per GPU" in said
    assert batch_warnings(batch, 4, on_gpus=False) == []
    assert said.endswith("use 2 GPUs, or train.batch_size=128")
    refine = replace(batch, refine=replace(batch.refine, images=9, batch_size=64))
    assert batch_warnings(refine, 4, True, "refine")[0].endswith("use 2 GPUs, or refine.batch_size=128")
    assert batch_warnings(batch, 4, True, "refine") == []  # the stage is left out


def said_of_the_source(run: Run, source: Path, **shard: object) -> list[str]:
    settings = replace(run.config.shard, source=str(source), **shard)
    checked = replace(run, config=replace(run.config, shard=settings))
    return [finding.text for finding in source_is_there(checked) if finding.fatal]


def test_every_kind_of_data_set_passes_the_check_of_the_source(run, tmp_path):
    make_toy_shapes(tmp_path / "shapes", 12)
    assert said_of_the_source(run, tmp_path / "shapes", size=32) == []
    (said,) = said_of_the_source(run, tmp_path)
    assert said.startswith(f"key 'shard.source': {tmp_path}: holds no data set")


def test_labels_newer_than_the_shards_are_told_before_a_launch(run, tmp_path):
    make_toy_shapes(tmp_path / "shapes", 12)
    settings = replace(run.config.shard, source=str(tmp_path / "shapes"))
    planned = replace(run, config=replace(run.config, shard=settings))
    manifest = layout.shards_dir(planned.config) / layout.MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    os.utime(manifest, ns=(0, 0))
    (finding,) = source_is_there(planned)
    assert f"is newer than the shards in {manifest.parent}; delete" in finding.text and not finding.fatal


def test_images_smaller_than_the_shards_need_them_are_found_before_a_launch(run, tmp_path):
    folder = tmp_path / "shapes"
    make_toy_shapes(folder, 12)
    file = sorted(folder.rglob("*.png"))[0]
    Image.open(file).resize((40, 30)).save(file)
    (said,) = said_of_the_source(run, folder, size=32)
    assert said.startswith(
        f"key 'shard.size': got 32, but 1 of 12 images that were opened are smaller, {file}"
    )
    assert said.endswith("side of 30 pixels; use at most shard.size=30, or set shard.allow_upsampling=true")
    assert said_of_the_source(run, folder, size=30) == []
    assert said_of_the_source(run, folder, size=32, allow_upsampling=True) == []
    assert said_of_the_source(run, folder, size=32, skip_damaged=True) == []  # the stage leaves it out
    (said,) = said_of_the_source(run, folder, crop=31, allow_upsampling=True, size=16)
    assert said.startswith("key 'shard.crop': got 31, but 1 of 12")


def test_a_source_that_is_not_sound_is_found_before_a_launch(run, tmp_path):
    make_toy_shapes(tmp_path / "shapes", 12)
    next((tmp_path / "shapes").rglob("*.png")).unlink()
    (said,) = said_of_the_source(run, tmp_path / "shapes")
    assert said.startswith("key 'shard.source': ") and "shard.allow_subset=true" in said


def test_ranks_and_gpus_of_a_node_fit_each_other(slurm_run, run, monkeypatch):
    with pytest.raises(ConfigError, match="cluster.tasks_per_node.*4 ranks for 2 GPUs"):
        executor_named("slurm").resources(with_cluster(slurm_run, gpus_per_node="a100:2").config, "train")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    (said,) = executor_named("local").check([run], one_step(with_cluster(run, gpus_per_node=3)), False)
    assert "2 ranks leave 1 of 3 GPUs" in said and "cluster.tasks_per_node=3" in said


def test_a_folder_whose_name_slurm_would_change_is_refused(slurm_run, fake_slurm):
    step = one_step(slurm_run).steps[0]
    moved = replace(step.run, run_dir=slurm_run.run_dir / "100%jobs")
    with pytest.raises(ConfigError, match="key 'runs_dir'.*Slurm does not take '%j'"):
        executor_named("slurm").check([moved], one_step(moved), preflight=False)


def test_a_percent_sign_in_a_path_does_not_mislead_submitit(run, monkeypatch):
    moved = replace(run, run_dir=run.run_dir / "%j 100%true")
    shutil.copytree(run.run_dir, moved.run_dir, ignore=shutil.ignore_patterns("%*"))
    monkeypatch.setattr("slurm.job.StageJob", stand_in_jobs.StandIn)
    executor_named("local").run_all(one_step(moved), after_each=lambda run_dir: None)
    assert seen(moved.run_dir, 1)["RANK"] == "1"
    assert list((moved.run_dir / "logs" / "train" / "submitit" / "1").glob("*_0_log.err"))


def test_every_executor_is_declared_and_complete():
    assert tuple(EXECUTORS) == EXECUTOR_NAMES
    for name in EXECUTORS:
        assert executor_named(name).name == name


def test_refused_job_says_why_and_what_is_queued(slurm_run, fake_slurm):
    script = (fake_slurm / "sbatch").read_text()
    refuse = '[ "$id" = 13 ] && { echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1; }\n'
    (fake_slurm / "sbatch").write_text(script.replace("env >", refuse + "env >"))
    with pytest.raises(ConfigError, match="trial-train: .*invalid partition specified: gpu.*scancel 12"):
        executor_named("slurm").submit_all(plan([slurm_run], parse_stages(None)), [slurm_run])


def test_an_output_that_nobody_takes_leaves_no_half_chain(slurm_run, fake_slurm, monkeypatch):
    """The log of a launch lies on a full disk, or its terminal is gone: all jobs are submitted."""
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        executor_named("slurm").submit_all(plan([slurm_run], parse_stages(None)), [slurm_run])
    stages = [job["stage"] for job in json.loads((slurm_run.run_dir / "jobs.json").read_text())]
    assert stages == ["shard", "train", "classifier", "eval", "finish"]


def test_dry_run_names_jobs_in_place_of_ids_and_needs_no_slurm(slurm_run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert SlurmExecutor.affinity() == -1
    chain = plan([slurm_run], parse_stages(None))
    text = "\n".join(executor_named("slurm").describe(chain))
    assert "#SBATCH --dependency='afterok:<trial-train>:<trial-classifier>'" in text
    assert not (slurm_run.run_dir / "logs").exists()

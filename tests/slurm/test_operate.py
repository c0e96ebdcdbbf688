"""Operate a real Slurm: status, logs, cancel, detach, submit from inside a job, preflight."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from real import ROOT, job_ids, launch, profile, states, tool, wait_for

from slurm.queue import job_states, state_of

pytestmark = pytest.mark.slurm


def test_status_logs_and_cancel(submit_pair):
    run_dir = submit_pair("StopsOnce")
    wait_for(lambda: (run_dir / "rank0.0.json").exists(), "rank 0")
    before = tool("status.py", run_dir)
    assert before.returncode == 0 and [
        row for row in before.stdout.splitlines() if " train " in row and "RUNNING" in row
    ]
    cancelled = tool("cancel.py", run_dir)
    assert cancelled.returncode == 0 and job_ids(run_dir, "train")[0] in cancelled.stdout
    assert states(run_dir) == {"train": "CANCELLED", "eval": "CANCELLED", "finish": "COMPLETED"}
    assert "no job of these runs is queued" in tool("cancel.py", run_dir).stdout
    after = tool("status.py", run_dir, "--follow")  # returns, since all have ended
    assert "CANCELLED" in after.stdout


def test_logs_show_the_rank_that_failed(submit_pair):
    run_dir = submit_pair("Bug", max_crashes=1)
    assert states(run_dir)["train"] == "FAILED"
    shown = tool("logs.py", run_dir)
    assert "the very bug" in shown.stdout and "_1_log.err" in shown.stderr


def test_without_accounting_the_controller_is_asked(submit_pair, monkeypatch):
    run_dir = submit_pair("StandIn")
    assert states(run_dir)["eval"] == "COMPLETED"
    monkeypatch.setattr("slurm.queue.shutil.which", lambda name: None)
    ids = [job_ids(run_dir, stage)[0] for stage in ("train", "eval")]
    assert job_states([*ids, "999999"]) == dict.fromkeys(ids, "COMPLETED")


def test_a_job_submitted_from_inside_a_job_inherits_nothing_of_it(submit_pair, monkeypatch, cluster):
    for name, value in {
        "SLURM_CPU_BIND": "mask_cpu:0x1",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_JOB_ID": "1",
        "PMIX_RANK": "7",
    }.items():
        monkeypatch.setenv(name, value)
    run_dir = submit_pair("StandIn")
    monkeypatch.undo()
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    assert states(run_dir)["train"] == "COMPLETED"
    assert "_" not in job_ids(run_dir, "train")[0]


def listen_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_detaches_and_the_same_command_follows_the_same_job(cluster, noise_celeba, tmp_path):
    on = profile(tmp_path, nodes=1, tasks_per_node=1, extra_sbatch={"hold": "true"})
    words = [
        "--config",
        "sigma_cvae_nf",
        f"shard.source={noise_celeba}",
        f"runs_dir={tmp_path}/runs",
        "--stages",
        "shard",
        "--wait",
    ]
    command = [sys.executable, str(ROOT / "launch.py"), "--cluster", str(on), *words]
    # As from a terminal: a process that a script starts in the background ignores the signal.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": listen_to_ctrl_c}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout and process.stderr
        line = next(line for line in process.stdout if ": SUBMITTED" in line or ": PENDING" in line)
        assert "sigma_cvae_nf shard" in line
        process.send_signal(signal.SIGINT)
        assert "follow them again: python tools/status.py --follow" in process.stderr.read()
    assert process.returncode == 130
    run_dir = tmp_path / "runs" / "sigma_cvae_nf"
    (job_id,) = job_ids(run_dir, "shard")
    assert state_of(job_id) == "PENDING"
    with subprocess.Popen(command, text=True, **pipes) as process:
        said = [next(line for line in process.stdout if ": SUBMITTED" in line or ": PENDING" in line)]
        subprocess.run(["scontrol", "release", job_id], check=True)
        said += process.stdout
        assert process.wait() == 0, process.stderr.read()
    assert "sigma_cvae_nf shard: COMPLETED" in "".join(said)
    assert job_ids(run_dir, "shard") == [job_id]


# ---- preflight


@pytest.mark.parametrize(
    "cluster_keys,overrides,said",
    [
        ({"partition": "gpuu"}, [], "no partition 'gpuu' on this cluster, there are gpu, urgent; did you"),
        ({"gpus_per_node": 7}, [], "cluster.gpus_per_node=7"),
        ({"timeout_min": 20000}, [], "20000: the partition's limit is 10080"),
        ({"cpus_per_task": 64}, [], "cluster.cpus_per_task=64"),
        ({}, ["shard.source=/no/such/celeba"], "key 'shard.source': /no/such/celeba: no such folder"),
        ({}, ["tracking.uri=http://user:secret@127.0.0.1:9"], "key 'tracking.uri': http://***@127.0.0.1:9 "),
        ({}, ["eval.inception_weights=/no/weights.pth"], "key 'eval.inception_weights': /no/weights.pth"),
        ({"timeout_min": 2, "signal_delay_s": 120}, [], "key 'cluster.signal_delay_s' for stage train"),
    ],
)  # fmt: skip
def test_preflight_says_what_is_wrong_and_nothing_is_submitted(
    cluster, noise_celeba, tmp_path, cluster_keys, overrides, said
):
    on = profile(tmp_path, nodes=1, tasks_per_node=1, **cluster_keys)
    done = launch(
        "--cluster",
        on,
        "--config",
        "sigma_cvae_nf",
        f"shard.source={noise_celeba}",
        f"runs_dir={tmp_path}/runs",
        "name=checked",
        *overrides,
    )
    assert (
        done.returncode == 2
        and said in done.stderr
        and "nothing was submitted" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert "secret" not in done.stderr
    assert not (tmp_path / "runs").exists()
    assert "checked" not in cluster.run("squeue", "-h", "-t", "all", "-o", "%j")


def test_preflight_warns_of_an_uneven_batch_and_can_be_skipped(cluster, noise_celeba, tmp_path):
    on = profile(tmp_path, nodes=2, tasks_per_node=2, extra_sbatch={"hold": "true"})
    words = [
        "--config",
        "sigma_cvae_nf",
        f"shard.source={noise_celeba}",
        f"runs_dir={tmp_path}/runs",
        "train.batch_size=30",
    ]
    done = launch("--cluster", on, *words)
    assert (
        done.returncode == 0
        and "30 images over 4 ranks are shared unevenly: 6% of the ranks' time is lost; 32 would be even"
        in done.stderr
    )
    assert tool("cancel.py", tmp_path / "runs" / "sigma_cvae_nf").returncode == 0
    skipped = launch("--cluster", on, "--no-preflight", *words, "name=skipped")
    assert skipped.returncode == 0 and "unevenly" not in skipped.stderr
    assert tool("cancel.py", tmp_path / "runs" / "skipped").returncode == 0

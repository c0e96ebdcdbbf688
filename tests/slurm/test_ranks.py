"""GPUs and the meeting port of ranks, stop requests to local jobs, and errors before a stage begins."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in_jobs
from stand_in_jobs import seen, wait_for

from pipeline.config.load import dump
from pipeline.errors import ConfigError, UserError
from pipeline.rundir.record import run_config
from pipeline.runtime.preempt import StopFlag, Stopped
from slurm import ledger, rank
from slurm.chain import Chain, Run, Step, parse_stages, plan
from slurm.executors import executor_named
from slurm.preflight.chain_checks import torch_sees_gpus
from slurm.status import refresh, unfinished

ROOT = Path(__file__).resolve().parents[2]
NVIDIA_SMI = """\
GPU 0: NVIDIA A100 (UUID: GPU-aaaa)
GPU 1: NVIDIA A100 (UUID: GPU-bbbb)
  MIG 1g.5gb Device 0: (UUID: MIG-cccc)
  MIG 1g.5gb Device 1: (UUID: MIG-dddd)
"""


def on(run: Run, **cluster: object) -> Run:
    return replace(run, config=replace(run.config, cluster=replace(run.config.cluster, **cluster)))


def train_step(run: Run) -> Step:
    return Step(run, "train", run.run_dir / "train", ())


# ---- GPUs


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("2,3", ["2", "3"]),
        ("GPU-aa, MIG-bb", ["GPU-aa", "MIG-bb"]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("-1", []),
        ("3,3,1", ["3", "1"]),
    ],  # fmt: skip
)
def test_the_callers_choice_of_gpus_is_read_as_cuda_reads_it(monkeypatch, choice, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", choice)
    assert rank.visible_gpus() == names


def test_without_a_choice_all_gpus_and_mig_devices_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("slurm.rank.ask", lambda *command: NVIDIA_SMI)
    assert rank.visible_gpus() == ["0", "MIG-cccc", "MIG-dddd"]


def test_ranks_get_the_first_gpus_of_the_callers_choice(run, monkeypatch):
    monkeypatch.setattr("slurm.job.StageJob", stand_in_jobs.StandIn)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,3,2")
    chain = Chain([train_step(on(run, gpus_per_node=2))], [])
    executor_named("local").run_all(chain, after_each=lambda run_dir: None)
    assert [seen(run.run_dir, r)["CUDA_VISIBLE_DEVICES"] for r in (0, 1)] == ["GPU-aa,3", "GPU-aa,3"]


@pytest.mark.parametrize(("choice", "gpus", "ranks"), [("5,6,7", 3, 3), ("", 0, 2)])
def test_auto_takes_all_visible_gpus_with_one_rank_each_or_the_cpu(run, monkeypatch, choice, gpus, ranks):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", choice)
    local = executor_named("local")
    wanted = local.resources(on(run, gpus_per_node="auto").config, "train")
    assert (wanted.gpus_per_node, wanted.tasks_per_node) == (gpus, ranks)
    place = local.place(on(run, gpus_per_node="auto"))
    assert place.startswith(f"training on {'3 GPUs (CUDA_VISIBLE_DEVICES=5,6,7)' if gpus else 'the CPU'}")
    assert (
        executor_named("debug").resources(on(run, gpus_per_node="auto").config, "train").tasks_per_node == 1
    )


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (
            {"gpus_per_node": 2},
            "cluster.gpus_per_node.*train.*asked for 2 GPUs.*CUDA_VISIBLE_DEVICES='4' shows 1",
        ),
        ({"gpus_per_node": 1}, "cluster.tasks_per_node.*2 ranks for 1 GPUs"),
        ({"gpus_per_node": "many"}, "cluster.gpus_per_node.*'many'.*a100:4"),
    ],
)
def test_gpus_that_cannot_be_had_are_an_error_that_names_the_key(run, monkeypatch, cluster, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match=said):
        executor_named("local").resources(on(run, **cluster).config, "train")


def test_gpus_that_would_stay_idle_are_a_warning_with_the_number_of_ranks_for_all(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    one = on(run, gpus_per_node=3, tasks_per_node=2)
    warnings = executor_named("local").check([one], Chain([train_step(one)], []), preflight=False)
    assert any("2 ranks leave 1 of 3 GPUs" in text and "tasks_per_node=3" in text for text in warnings)


@pytest.mark.parametrize(
    ("python", "stages", "refused"),
    [("", "train,eval", True), ("other/bin", "train", False), ("", "shard", False)],
)
def test_the_build_of_this_pytorch_counts_only_for_ranks_that_use_it(
    run, monkeypatch, python, stages, refused
):
    """Another Python may have another PyTorch, and its ranks look themselves. Sharding needs no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr("slurm.preflight.chain_checks.version_of", lambda package: "2.13.0+cpu")
    chain = plan([on(run, gpus_per_node=2, python=python)], parse_stages(stages))
    found = list(torch_sees_gpus(chain))
    assert [finding.fatal for finding in found] == [True] * refused
    for finding in found:
        assert "cluster.gpus_per_node' for stage train: got 2, but PyTorch 2.13.0+cpu" in finding.text


def test_a_rank_never_falls_back_to_the_cpu(run, monkeypatch):
    import torch

    environment = SimpleNamespace(name=lambda: "local", local_rank=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match="cluster.gpus_per_node.*sees 1 GPUs"):
        rank.require_gpus(environment, run_config(run.run_dir), "train")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    rank.require_gpus(environment, run_config(run.run_dir), "train")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rank.require_gpus(environment, run_config(run.run_dir), "train")


def test_on_slurm_a_rank_may_see_its_own_gpu_only(run, monkeypatch):
    import torch

    wanted = on(run, executor="slurm", gpus_per_node="a100:4")
    (run.run_dir / "config.yaml").write_text(dump(wanted.config))
    environment = SimpleNamespace(name=lambda: "slurm", local_rank=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rank.require_gpus(environment, run_config(run.run_dir), "train")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="cluster.gpus_per_node.*got a100:4"):
        rank.require_gpus(environment, run_config(run.run_dir), "train")


def test_each_rank_sees_its_own_mig_device_because_cuda_shows_only_the_first(run, monkeypatch):
    for number, own in enumerate(("MIG-aa", "MIG-bb", "MIG-aa")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aa,MIG-bb")
        rank.choose_own_part(SimpleNamespace(local_rank=number))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-aa")
    rank.choose_own_part(SimpleNamespace(local_rank=1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,GPU-aa"


def test_gpus_asked_for_by_an_option_of_sbatch_must_be_there_too(run, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for options in ({"gres": "gpu:2"}, {"gpus_per_task": "1"}, {"tres-per-task": "gres/gpu:1"}):
        wanted = on(run, executor="slurm", gpus_per_node=0, extra_sbatch=options)
        environment = SimpleNamespace(name=lambda: "slurm", local_rank=0)
        with pytest.raises(ConfigError, match="sees 0 GPUs"):
            rank.require_gpus(environment, wanted.config, "train")
        assert executor_named("slurm").place(wanted).endswith("GPUs as cluster.extra_sbatch asks")


def test_a_container_without_nvidia_smi_still_has_its_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("slurm.rank.ask", lambda *command: None)
    monkeypatch.setattr(rank, "DEVICES", tmp_path)
    assert rank.visible_gpus() == []
    for name in ("nvidia2", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert rank.visible_gpus() == ["0", "1"]


# ---- the port


def environment_of(number: int, folder: Path) -> SimpleNamespace:
    return SimpleNamespace(global_rank=number, num_tasks=2, job_id="7", paths=SimpleNamespace(folder=folder))


def test_rank_0_tells_its_port_and_holds_it_until_torch_listens(tmp_path, monkeypatch):
    from torch.distributed import TCPStore

    monkeypatch.setattr(rank, "_held", [])
    port = rank.shared_port(environment_of(0, tmp_path), StopFlag())
    assert rank.shared_port(environment_of(1, tmp_path), StopFlag()) == port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    assert TCPStore("127.0.0.1", port, 1, True).port == port


def test_another_attempt_has_another_port_and_a_stopped_rank_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "_held", [])
    first = rank.shared_port(environment_of(0, tmp_path), StopFlag())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(Stopped):  # the first attempt's port is not taken for this one's
        rank.shared_port(environment_of(1, tmp_path), stop)
    second = rank.shared_port(environment_of(0, tmp_path), StopFlag())
    assert second != first  # the first one is still held
    assert rank.shared_port(environment_of(1, tmp_path), StopFlag()) == second


# ---- hang-up, status and cancel of local jobs

LAUNCHER = """
import sys
from pathlib import Path
import stand_in_jobs
import slurm.job
from pipeline.rundir.record import run_config
from slurm.chain import Chain, Run, Step
from slurm.executors import executor_named
slurm.job.StageJob = stand_in_jobs.StopsOnce
run_dir = Path(sys.argv[1])
run = Run(run_config(run_dir), run_dir)
executor_named("local").launch([run], Chain([Step(run, "train", run_dir / "train", ())], []), None, False)
"""


def signals_as_in_a_terminal() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def signals_as_under_nohup() -> None:
    signals_as_in_a_terminal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.fixture
def launched(run, request):
    """A launcher in a process of its own, with a job whose two ranks work until they are asked to stop."""
    quiet = replace(run.config, tracking=replace(run.config.tracking, enabled=False))
    (run.run_dir / "config.yaml").write_text(dump(quiet))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.run_dir)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=getattr(request, "param", signals_as_in_a_terminal),
    )
    try:
        wait_for(lambda: all((run.run_dir / f"rank{r}.0.json").exists() for r in (0, 1)), 60)
        yield run.run_dir, launcher
    finally:
        launcher.kill()
        launcher.wait()
        for job in json.loads((run.run_dir / "jobs.json").read_text()):
            if ledger.alive(job["process"]):
                os.kill(job["process"]["pid"], signal.SIGKILL)


def state_of_train(run_dir: Path) -> str:
    return json.loads((run_dir / "jobs.json").read_text())[0]["state"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_hang_up_termination_and_ctrl_c_stop_the_ranks_and_then_the_launcher(launched, number):
    run_dir, launcher = launched
    launcher.send_signal(number)
    assert "continue with" in launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 130
    assert state_of_train(run_dir) == "CANCELLED"
    assert (run_dir / "step.0").read_text() == (run_dir / "step.1").read_text() == "39"


@pytest.mark.parametrize("launched", [signals_as_under_nohup], indirect=True)
def test_under_nohup_a_hang_up_reaches_nobody(launched):
    run_dir, launcher = launched
    controller = json.loads((run_dir / "jobs.json").read_text())[0]["process"]["pid"]
    ranks = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    assert len(ranks) == 2
    for pid in (launcher.pid, controller, *ranks):
        ignored = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert int(ignored[1], 16) >> (signal.SIGHUP - 1) & 1, Path(f"/proc/{pid}/cmdline").read_bytes()
    launcher.terminate()
    launcher.communicate(timeout=60)


def test_cancel_knows_a_local_job_whose_launcher_was_killed(launched):
    run_dir, launcher = launched
    launcher.kill()
    launcher.wait()
    assert [job["state"] for job in unfinished(run_dir)] == ["RUNNING"]
    command = [sys.executable, str(ROOT / "tools" / "cancel.py"), str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "cancelled: " in done.stdout
    wait_for(lambda: state_of_train(run_dir) == "CANCELLED")
    assert (
        "no job of these runs" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    )


def test_a_local_job_that_vanished_has_failed_and_one_of_another_host_is_left_alone(run):
    gone = subprocess.Popen(["true"])
    gone.wait()
    process = {"host": socket.gethostname(), "pid": gone.pid, "started": 1}
    for stage, host in (("train", process["host"]), ("eval", "elsewhere")):
        submission = ledger.Submission("local", "logs", process={**process, "host": host})
        ledger.submitted(run.run_dir, stage, "5", submission)
        ledger.started(run.run_dir, stage, "5", [host])
    refresh(run.run_dir)
    states = {job["stage"]: job["state"] for job in json.loads((run.run_dir / "jobs.json").read_text())}
    assert states == {"train": "FAILED", "eval": "RUNNING"}
    with pytest.raises(UserError, match="elsewhere: cancel it there"):
        executor_named("local").cancel(unfinished(run.run_dir))


def test_status_and_cancel_of_a_run_that_can_only_be_read(run, monkeypatch):
    gone = ledger.process(os.getpid()) | {"started": 1}
    for stage, process in (("shard", gone), ("train", ledger.process(os.getpid()))):
        ledger.submitted(run.run_dir, stage, "5", ledger.Submission("local", "logs", process=process))
    before = (run.run_dir / "jobs.json").read_bytes()
    (run.run_dir / ".lock").unlink()
    (run.run_dir / ".lock").mkdir()  # not even root can open it
    assert [job["state"] for job in refresh(run.run_dir)] == ["FAILED", "SUBMITTED"]
    assert (run.run_dir / "jobs.json").read_bytes() == before

    def kill(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(UserError, match="^train job 5 runs as another user, who alone can cancel it"):
        executor_named("local").cancel(unfinished(run.run_dir))


# ---- errors before a stage begins


NO_PYTHON = "/var/spool/script: line 9: pyhton: command not found"
NO_MODULE = "ModuleNotFoundError: No module named 'slurm'"
NO_MEMORY = "slurmstepd: error: Detected 1 oom_kill event in StepId=3.0."
NOISE = "srun: error: n1: task 0: Exited with exit code 1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"Traceback (most recent call last):\n{NO_MODULE}\n{NOISE}\n", NO_MODULE),
        (f"{NO_PYTHON}\n{NOISE}\n", NO_PYTHON),
        (f"{NO_MEMORY}\n", NO_MEMORY),
        ("ValueError: of the first attempt\n### attempt 1 of job 5\nstep 3 of 9\n", ""),
    ],
)
def test_the_log_tells_why_a_job_ended_before_its_stage(tmp_path, text, said):
    (tmp_path / "5_0_log.err").write_text(text)
    assert ledger.last_words(tmp_path, "5") == said


def test_another_rank_tells_if_srun_ended_rank_0_before_it_could(tmp_path):
    cut_off = (
        "### attempt 0 of job 5\nTraceback (most recent call last):\nsrun: Force Terminated StepId=5.0\n"
    )
    (tmp_path / "5_0_log.err").write_text(cut_off)
    (tmp_path / "5_10_log.err").write_text("KeyError: later\n")
    (tmp_path / "5_2_log.err").write_text(f"{NO_MODULE}\n")
    assert ledger.last_words(tmp_path, "5") == NO_MODULE
    (tmp_path / "5_0_log.err").write_text(f"{cut_off}### attempt 1 of job 5\nstep 3 of 9\n")
    assert ledger.last_words(tmp_path, "5") == ""  # who knows from which attempt rank 2's error is


def test_a_local_job_that_cannot_start_says_why(run, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    chain = Chain([train_step(on(run, python=str(broken)))], [])
    with pytest.raises(SystemExit, match="No module named 'torch'"):
        executor_named("local").run_all(chain, after_each=lambda run_dir: None)
    failure = ledger.failure(run.run_dir, "train")
    assert failure and failure["message"] == "ModuleNotFoundError: No module named 'torch'"

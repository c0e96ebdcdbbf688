"""Helpers of the tests on a real Slurm: the cluster, a tiny training, faults, and how to compare runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from pipeline.rundir.metrics_log import read_metrics
from slurm.queue import FINAL, state_of
from tools.dev.slurm_parts.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 240
INTERVAL = 20  # steps between checkpoints
AT = 45  # the step from which on a fault strikes
TINY = (
    "shard.size=16", "shard.samples_per_shard=20", "model.net.channels=[8,16]", "model.z_dim=8",
    "model.conditioner.width=8", "model.prior.hidden=16", "model.prior.flow.layers=2",
    "model.prior.flow.hidden=16", "train.batch_size=8", f"train.images={8 * STEPS}", "train.val_interval=60",
    f"train.max_lost_steps={INTERVAL}", "train.log_interval=5", "train.threads=1", "optim.warmup_images=16",
    "train.kl_warmup_images=64", "classifier.epochs=1", "classifier.batch_size=8", "eval.n=6",
    "eval.judge=false", "eval.flip_images=2", "eval.block=4", "eval.iw_images=4",
    "eval.iw_samples=2", "eval.rare_samples=4",
)  # fmt: skip
HOST_DEPENDENT = ("train/images_per_s", "train/data_wait_share")


def wait_for(condition: Callable[[], object], what: str, limit_s: float = 240.0) -> None:
    """Poll until `condition()` holds; TimeoutError names `what`."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.1)


@contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """Start the cluster and set its variables here. It ends with this process, however that dies."""
    before = dict(os.environ)
    command = [
        sys.executable,
        str(ROOT / "tools" / "dev" / "dev_slurm.py"),
        "hold",
        "--folder",
        str(cluster.folder),
    ]
    numbers = ["--nodes", str(cluster.nodes), "--cpus", str(cluster.cpus), "--prefix", cluster.prefix]
    holder = subprocess.Popen([*command, *numbers], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin and holder.stdout
    try:
        assert holder.stdout.readline() == "ready\n", "the cluster did not start"
        os.environ.update(cluster.env)
        yield cluster
    finally:
        holder.stdin.close()
        holder.wait(60)
        os.environ.clear()
        os.environ.update(before)


def launch(*args: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """`launch.py` as a user calls it."""
    command = [sys.executable, str(root / "launch.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def tool(name: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def profile(folder: Path, **cluster: object) -> Path:
    """A cluster profile of the test cluster."""
    base = {
        "executor": "slurm",
        "partition": "gpu",
        "cpus_per_task": 1,
        "mem_gb": 2,
        "timeout_min": 60,
        "gpus_per_node": 0,
    }
    base["setup"] = ["export OMP_NUM_THREADS=1"]
    file = folder / f"profile_{len(list(folder.glob('profile_*')))}.yaml"
    file.write_text(json.dumps({"cluster": base | cluster}))  # JSON is YAML
    return file


def job_ids(run_dir: Path, stage: str) -> list[str]:
    """Ids of the jobs of a stage, oldest first."""
    return [job["id"] for job in json.loads((run_dir / "jobs.json").read_text()) if job["stage"] == stage]


def entry(run_dir: Path, stage: str) -> dict:
    """The last entry of a stage in jobs.json."""
    return [job for job in json.loads((run_dir / "jobs.json").read_text()) if job["stage"] == stage][-1]


def step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl."""
    records = read_metrics(run_dir / "train" / "metrics.jsonl")
    return max((record["step"] for record in records), default=0)


def ended(job_id: str) -> bool:
    """Whether a job has come to its end for good."""
    return state_of(job_id) in FINAL


def ranks_of(job_id: str) -> dict[int, int]:
    """{rank: pid} of the processes of a job on this host."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item
            )
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        # Two test clusters on one host count their jobs alike.
        ours = (
            environment.get(b"SLURM_CONF") == os.environ["SLURM_CONF"].encode()
            and environment.get(b"SLURM_JOB_ID") == job_id.encode()
        )
        if ours and b"submitit.core._submit" in command and b"srun" not in command:
            found[int(environment.get(b"SLURM_PROCID", b"-1"))] = int(folder.name)
    return found


def states(run_dir: Path) -> dict[str, str | None]:
    """Return what Slurm says of the pair and of the finishing job, once all have ended."""
    ids = {stage: job_ids(run_dir, stage)[-1] for stage in ("train", "eval", "finish")}
    wait_for(lambda: all(ended(job_id) for job_id in ids.values()), f"the end of {ids}")
    return {stage: state_of(job_id) for stage, job_id in ids.items()}


# ---- faults: each disturbs one job

Fault = Callable[[Cluster, str, list[str]], None]


def stop_signal(cluster: Cluster, job_id: str, nodes: list[str]) -> None:
    """The signal that Slurm sends before the time limit."""
    cluster.run("scancel", "--signal=USR2", job_id)


def requeue(cluster: Cluster, job_id: str, nodes: list[str]) -> None:
    """An operator requeues the job."""
    cluster.run("scontrol", "requeue", job_id)


def preempt(cluster: Cluster, job_id: str, nodes: list[str]) -> None:
    """A job of a partition with priority wants the nodes."""
    cluster.run(
        "sbatch",
        "-p",
        "urgent",
        "-w",
        ",".join(nodes),
        f"-N{len(nodes)}",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 1",
    )


def kill_rank(cluster: Cluster, job_id: str, nodes: list[str]) -> None:
    """The last rank dies without a word."""
    ranks = ranks_of(job_id)
    os.kill(ranks[max(ranks)], signal.SIGKILL)


def kill_slurmd(cluster: Cluster, job_id: str, nodes: list[str]) -> None:
    """The daemon of the job's last node dies. Slurm soon takes the node for dead, though its rank lives on.

    The rank on the other node is frozen, else so small a training ends before Slurm notices.
    """
    os.kill(ranks_of(job_id)[0], signal.SIGSTOP)
    os.kill(cluster.pid(f"slurmd.{nodes[-1]}"), signal.SIGKILL)


FAULTS: dict[str, Fault] = {
    "signal": stop_signal,
    "requeue": requeue,
    "preempt": preempt,
    "kill_rank": kill_rank,
    "kill_slurmd": kill_slurmd,
}


def disturbed(
    cluster: Cluster, folder: Path, celeba: Path, faults: dict[str, Fault], tasks: int, *overrides: str
) -> dict[str, Path]:
    """Train undisturbed ("calm") and once per fault, all at the same time, each on two nodes of its own.

    Returns the run directories.

    `tasks` per node; a fault strikes at step AT. Prints what each one cost.
    """
    common = [f"shard.source={celeba}", f"runs_dir={folder}", *TINY, *overrides]
    places = {
        name: [f"{cluster.prefix}{2 * i + 1}", f"{cluster.prefix}{2 * i + 2}"]
        for i, name in enumerate(["calm", *faults])
    }
    first = launch(
        "--cluster",
        profile(folder, nodes=1, tasks_per_node=1),
        "--config",
        "sigma_cvae_nf",
        "--stages",
        "shard",
        *common,
    )
    assert first.returncode == 0, first.stderr
    wait_for(lambda: entry(folder / "sigma_cvae_nf", "shard")["state"] == "COMPLETED", "shards")
    jobs, struck = {}, {}

    def confined(name: str) -> Path:
        elsewhere = [n for other, place in places.items() if other != name for n in place]
        spare = [f"{cluster.prefix}13"] if name != "kill_slurmd" else []
        return profile(
            folder, nodes=2, tasks_per_node=tasks, extra_sbatch={"exclude": ",".join(elsewhere + spare)}
        )

    profiles = {name: confined(name) for name in places}

    def launch_and_strike(name: str) -> None:
        done = launch(
            "--cluster",
            profiles[name],
            "--config",
            "sigma_cvae_nf",
            "--stages",
            "train",
            f"name={name}",
            *common,
        )
        assert done.returncode == 0, done.stderr
        (jobs[name],) = job_ids(folder / name, "train")
        if name in faults:
            wait_for(lambda: step(folder / name) >= AT, f"{name}: step {AT}")
            assert ranks_of(jobs[name]).keys() == set(range(2 * tasks))
            struck[name] = (time.time(), step(folder / name))
            faults[name](cluster, jobs[name], places[name])

    with ThreadPoolExecutor(
        len(places)
    ) as pool:  # each is struck as soon as it is there: none ends while another is being launched
        list(pool.map(launch_and_strike, places))
    for name, job_id in jobs.items():
        wait_for(lambda job_id=job_id: ended(job_id), f"{name}: end")
        assert state_of(job_id) == "COMPLETED", (name, (folder / name / "jobs.json").read_text())
    if "kill_slurmd" in faults:
        cluster.start_node(places["kill_slurmd"][1])
    for name, (when, at) in struck.items():
        again = entry(folder / name, "train")["attempts"][1]["started"] - when
        print(
            f"{name}: struck at step {at} (last logged), "
            f"went on at step {resumed_at(folder / name)}, {again:.0f} s later"
        )
    return {name: folder / name for name in places}


# ---- what must hold afterwards


def weights(run_dir: Path) -> dict:
    """All tensors of the last checkpoint: weights, averaged weights, moments."""
    return load_file(max((run_dir / "train" / "checkpoints").glob("step_*.safetensors")))


def series(run_dir: Path) -> list[tuple]:
    """Every deterministic number of metrics.jsonl, in the order of the file."""
    records = read_metrics(run_dir / "train" / "metrics.jsonl")
    return [
        (r["step"], k, repr(v)) for r in records for k, v in r["values"].items() if k not in HOST_DEPENDENT
    ]


def resumed_at(run_dir: Path) -> list[int]:
    """Steps at which attempts went on."""
    return [
        int(s)
        for s in re.findall(r"resuming at step (\d+)", (run_dir / "logs" / "train" / "rank0.log").read_text())
    ]

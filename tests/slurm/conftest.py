"""Fixtures: a run of two ranks on this machine, and a sbatch that only remembers."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.load import dump
from pipeline.config.schema import ClusterConfig, RunConfig
from slurm.chain import Chain, Run, Step
from slurm.executors import executor_named

HERE = str(Path(__file__).parent)
sys.path.append(HERE)  # stand_in_jobs, which jobs import by name


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let Ctrl-C interrupt, as in a terminal: tests that a script starts in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run in a folder with a space and a quote in its name."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    runs_dir = tmp_path / "a folder's name"
    config = RunConfig(name="trial", runs_dir=str(runs_dir), cluster=ClusterConfig(tasks_per_node=2))
    (runs_dir / "trial").mkdir(parents=True)
    (runs_dir / "trial" / "config.yaml").write_text(dump(config))
    return Run(config, runs_dir / "trial")


@pytest.fixture
def slurm_run(run: Run) -> Run:
    """The same for a cluster, with everything set that can be."""
    cluster = ClusterConfig(
        executor="slurm", nodes=2, tasks_per_node=4, gpus_per_node=4, cpus_per_task=6, mem_gb=64,
        timeout_min=300, partition="gpu", account="me", qos="high", constraint="a100",
        python="apptainer exec --nv my.sif python",
        setup=["module load cuda"], extra_sbatch={"reservation": "my course", "exclusive": "true"},
    )  # fmt: skip
    return replace(run, config=replace(run.config, cluster=cluster))


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of PATH with a srun, and a sbatch that hands out job ids.

    It keeps its environment in env.<id>.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "sbatch").write_text(
        f'#!/bin/sh\ncd "{folder}"\necho x >> ids\nid=$((11 + $(wc -l < ids)))\n'
        'env > env.$id\necho "Submitted batch job $id"\n'
    )
    for name in ("srun", "sbatch"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real Slurm of 13 nodes with 2 processors each, on this host."""
    from real import Cluster, running

    from tools.dev.slurm_parts.cluster import missing

    if absent := missing():
        say = (
            pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip
        )  # CI installs Slurm and must have run these tests
        say(f"needs Slurm's packages (see tools/dev/dev_slurm.py): {', '.join(absent)} not installed")
    prefix = (
        os.environ.get("PYTEST_XDIST_WORKER", "") + "n"
    )  # control groups are named after nodes: two clusters must not share names
    with running(Cluster(tmp_path_factory.mktemp("slurm"), nodes=13, cpus=2, prefix=prefix)) as started:
        yield started


@pytest.fixture
def submit_pair(cluster, run, monkeypatch):
    """Submit a train job of the given kind and an evaluation after it; returns the run directory."""

    def go(kind: str, **limits: object) -> Path:
        import stand_in_jobs

        from pipeline.config.load import dump

        monkeypatch.setattr("slurm.job.StageJob", getattr(stand_in_jobs, kind))
        on = replace(
            run.config.cluster, executor="slurm", partition="gpu", mem_gb=1, tasks_per_node=2, **limits
        )
        one = Run(
            replace(run.config, cluster=on, tracking=replace(run.config.tracking, enabled=False)), run.run_dir
        )
        (one.run_dir / "config.yaml").write_text(dump(one.config))
        steps = [
            Step(one, "train", one.run_dir / "train", ()),
            Step(one, "eval", one.run_dir / "eval", (one.run_dir / "train",)),
        ]
        executor_named("slurm").submit_all(Chain(steps, []), [one])
        return one.run_dir

    return go

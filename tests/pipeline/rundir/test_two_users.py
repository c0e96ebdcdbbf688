"""Two users of one group, as docs/operations/sites.md promises: real processes of two user ids."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fake_run import add_eval

STORED = ROOT / "tests" / "data" / "stored_run"
GROUP, ANN, BOB = 30000, 20001, 20002
Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that belongs to the group; pytest's own folders are closed to other users."""
    if os.getuid():
        pytest.skip("needs root, to act as two users")
    made = Path(tempfile.mkdtemp(prefix="two-users-"))
    made.chmod(0o755)
    runs = made / "runs"
    runs.mkdir()
    os.chown(runs, ANN, GROUP)
    runs.chmod(0o2775)
    yield runs
    shutil.rmtree(made)


def run_as(user: int, umask: int, words: list[str]) -> subprocess.CompletedProcess:
    """Run a program as a user of the group, in the checkout."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        **os.environ,
        "HOME": "/nonexistent",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *packages]),
    }
    return subprocess.run(
        words,
        user=user, group=GROUP, extra_groups=[], umask=umask, cwd=ROOT, env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def act(folder: Path) -> Command:
    """Run a script of this project as a user, with a umask: act(user, umask, script, *words)."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (
        os.path.realpath(sys.executable),
        f"/usr/bin/{version}",
    ):  # the first may lie in a closed home
        with suppress(OSError):
            if run_as(BOB, 0o022, [python, "-c", "import torch, pipeline.run"]).returncode == 0:
                return lambda user, umask, *words: run_as(user, umask, [python, *map(str, words)])
    pytest.skip("another user cannot read this checkout, its packages or its Python")


def own_run(folder: Path, umask: int) -> Path:
    """Return a trained run of Ann, with the modes that her umask gives."""
    for source in sorted(STORED.rglob("*")):
        target = folder / source.relative_to(STORED)
        if source.is_dir():
            target.mkdir()
        else:
            shutil.copyfile(source, target)
    for path in folder.rglob("*"):
        os.chown(path, ANN, GROUP)
        path.chmod((0o2777 if path.is_dir() else 0o666) & ~umask)
    return folder / "stored"


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_with_umask_002_the_group_continues_a_run(folder: Path, act: Command) -> None:
    run_dir = own_run(folder, 0o002)
    again = ("launch.py", "--run-dir", run_dir, "--stages", "train", "cluster.tasks_per_node=1")
    for user, images in ((BOB, 80), (ANN, 96)):
        succeeded(act(user, 0o002, *again, f"train.images={images}"))
        assert "train" in succeeded(act(user, 0o002, "tools/status.py", run_dir))
    files = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert {path.stat().st_uid for path in files} == {ANN, BOB}
    closed = [str(path) for path in files if not path.stat().st_mode & stat.S_IWGRP]
    assert not closed and {path.stat().st_gid for path in files} == {GROUP}


@pytest.mark.slow
def test_with_umask_002_the_group_evaluates_and_compares_a_run(folder: Path, act: Command) -> None:
    run_dir = own_run(folder, 0o002)
    small = (
        "eval.n=4",
        "eval.block=2",
        "eval.metrics=[reconstruction]",
        "eval.judge=false",
        "classifier.epochs=1",
    )
    again = ("launch.py", "--run-dir", run_dir, "cluster.tasks_per_node=1", *small)
    succeeded(act(BOB, 0o002, *again, "--stages", "classifier,eval", "tracking.enabled=true"))
    succeeded(act(ANN, 0o002, *again, "--stages", "eval", "tracking.enabled=true"))
    for user in (BOB, ANN):
        succeeded(act(user, 0o002, "tools/compare.py", run_dir, "--out", folder / "comparison.html"))
        succeeded(act(user, 0o002, "tools/sync_mlflow.py", run_dir))
    files = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert not [str(path) for path in files if not path.stat().st_mode & stat.S_IWGRP]


@pytest.mark.slow
def test_with_umask_022_others_read_a_run_and_start_from_its_weights(folder: Path, act: Command) -> None:
    run_dir = own_run(folder, 0o022)
    add_eval(run_dir, 1)
    (run_dir / "logs/train").mkdir(parents=True)
    (run_dir / "logs/train/rank0.log").write_text("the last line\n")
    mine = folder.parent / "bob"
    mine.mkdir()
    os.chown(mine, BOB, GROUP)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "stored" in succeeded(act(BOB, 0o022, "tools/status.py", run_dir))
    assert "stored" in succeeded(act(BOB, 0o022, "tools/status.py", "--runs-dir", folder))
    assert "the last line" in succeeded(act(BOB, 0o022, "tools/logs.py", run_dir, "train"))
    succeeded(act(BOB, 0o022, "tools/compare.py", run_dir, "--out", mine / "comparison.html"))
    refused = act(BOB, 0o022, "launch.py", "--run-dir", run_dir, "--stages", "train", "train.images=96")
    assert refused.returncode == 2 and "cannot be written" in refused.stderr
    (shards,) = (folder / "_shared" / "shards").iterdir()
    start = (f"train.init_from={run_dir}", f"data.shards={shards}", f"runs_dir={mine}", "name=next")
    words = ("--config", run_dir / "config.yaml", "--stages", "train", "cluster.tasks_per_node=1", *start)
    succeeded(act(BOB, 0o022, "launch.py", *words))
    assert (mine / "next" / "train" / "done.json").exists()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

"""One owner per run directory: refused upon proof of life, taken over at once from the dead."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import OwnedError, StorageError
from pipeline.runtime import owner
from pipeline.runtime.owner import FILE, acquire, start_ticks
from tests.conftest import ROOT

HOLD = (
    "import sys, time; from pathlib import Path; from pipeline.runtime.owner import acquire;"
    "own = acquire(Path(sys.argv[1]), 'job 17');"
    "print('mine', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path):
    """A real process that owns tmp_path/train."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "train")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def other_host(folder: Path, **more) -> dict:
    """The record that a process on another host would have written, without a lock that this host can see."""
    who = {"host": "node7", "pid": 1, "started": 1, "job": "4711", "token": "x", "beat": 3} | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(who))
    return who


def test_a_second_owner_is_refused_with_job_process_and_host(holder, tmp_path):
    with pytest.raises(
        OwnedError,
        match=rf"is being trained by job job 17, process {holder.pid} on .*; wait for it, cancel it",
    ):
        acquire(tmp_path / "train")


def test_a_stopped_owner_is_alive(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(OwnedError):
        acquire(tmp_path / "train")


def test_a_killed_owner_is_followed_at_once(holder, tmp_path, caplog):
    holder.kill()
    holder.wait()
    before = time.monotonic()
    own = acquire(tmp_path / "train")
    assert (
        time.monotonic() - before < owner.BEAT_S
    )  # no watching: the kernel has freed the lock, and it was this host
    assert f"process {holder.pid} on" in caplog.text and "is gone" in caplog.text
    own.check()
    own.release()
    assert (tmp_path / "train" / FILE).read_text() == ""


def test_an_orderly_end_leaves_nothing_to_wait_for(tmp_path, caplog):
    acquire(tmp_path).release()
    acquire(tmp_path).release()
    assert not caplog.records


def test_another_host_is_watched_and_its_moving_heartbeat_refuses(tmp_path, monkeypatch):
    """As on a file system that keeps locks to one host."""
    who = other_host(tmp_path)
    monkeypatch.setattr(owner.time, "sleep", lambda s: other_host(tmp_path, beat=who["beat"] + 1))
    with pytest.raises(OwnedError, match="job 4711, process 1 on node7"):
        acquire(tmp_path)


def test_another_host_that_is_silent_is_dead(tmp_path, monkeypatch):
    other_host(tmp_path)
    monkeypatch.setattr(owner, "BEAT_S", 0.2)
    own = acquire(tmp_path)
    assert "node7" not in (tmp_path / FILE).read_text()  # it is ours now
    own.release()


def test_another_host_that_has_been_silent_for_long_is_followed_at_once(tmp_path, monkeypatch):
    """A requeued job on another node: its predecessor's last heartbeat is older than the watch would take."""
    other_host(tmp_path)
    os.utime(tmp_path / FILE, (time.time() - 100, time.time() - 100))
    monkeypatch.setattr(owner.time, "sleep", lambda s: pytest.fail("watched"))
    acquire(tmp_path).release()
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_lock_that_outlived_its_owner_is_broken_and_the_sleeper_leaves(holder, tmp_path, monkeypatch):
    """NFS may keep the lock of a dead node: held, without a heartbeat. Its owner may wake up later."""
    monkeypatch.setattr(owner, "STALE_S", 0.5)
    file = tmp_path / "train" / FILE
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"host": "node7"}).ljust(500)
    )  # its proof of life on this host is hidden
    holder.send_signal(signal.SIGSTOP)
    own = acquire(tmp_path / "train")
    own.check()
    holder.send_signal(signal.SIGCONT)
    assert holder.wait(timeout=60) == 1
    own.check()
    own.release()


def test_without_locks_a_living_owner_of_this_host_is_found_by_its_process(tmp_path, monkeypatch):
    def flock(handle, kind):
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(fcntl, "flock", flock)
    own = acquire(tmp_path)
    with pytest.raises(OwnedError, match=f"process {os.getpid()} on"):
        acquire(tmp_path)
    own.release()
    acquire(tmp_path).release()


def test_a_zombie_is_no_living_process():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(child.pid) is None
    child.wait()


def test_a_lost_place_is_noticed_before_a_checkpoint_is_written(tmp_path):
    own = acquire(tmp_path)
    other_host(tmp_path)
    with pytest.raises(OwnedError, match="was taken over by job 4711"):
        own.check()
    own.release()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        acquire(tmp_path / "file" / "train")


def test_a_pid_that_was_given_away_again_is_another_process():
    assert start_ticks(os.getpid()) is not None
    assert start_ticks(2**22 + 1) is None

"""Locks between processes, and file systems that have none."""

import errno
import fcntl
import logging
import os

import pytest

from pipeline.errors import StorageError
from pipeline.rundir import lock
from pipeline.rundir.lock import locked, try_lock


def refuse_with(number):
    def flock(handle, kind):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture
def nothing_told(monkeypatch):
    monkeypatch.setattr(lock, "_told", set())


def test_a_lock_keeps_others_out_until_it_is_free(tmp_path):
    file = tmp_path / "folder" / "work.lock"
    asked = []
    with locked(file):
        with open(file, "a+") as other:
            assert not try_lock(other.fileno(), file)
        with locked(file, keep_waiting=lambda: bool(asked.append(1))):
            assert asked == [1]  # went on without the lock
        with pytest.raises(TimeoutError), locked(file, keep_waiting=give_up):
            raise AssertionError("the lock was held")
    with open(file, "a+") as other:
        assert try_lock(other.fileno(), file)


def give_up():
    raise TimeoutError


def test_shared_holders_keep_out_only_an_unshared_one(tmp_path):
    file = tmp_path / "work.lock"
    with locked(file, shared=True), locked(file, shared=True), open(file, "a+") as other:
        assert not try_lock(other.fileno(), file)


@pytest.mark.parametrize("number", lock.NO_LOCKS)
def test_without_locks_the_work_goes_on_with_one_warning(number, tmp_path, monkeypatch, caplog, nothing_told):
    monkeypatch.setattr(fcntl, "flock", refuse_with(number))
    for name in ("a.lock", "b.lock"):
        with locked(tmp_path / name):
            pass
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "no file locks" in record.getMessage()
    assert str(tmp_path) in record.getMessage()


def test_another_failure_is_not_taken_for_a_file_system_without_locks(tmp_path, monkeypatch, nothing_told):
    monkeypatch.setattr(fcntl, "flock", refuse_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path / "a.lock"):
        pass


def test_a_lock_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "a.lock").mkdir()  # not even root can open it as a file
    with (
        pytest.raises(StorageError, match="a.lock: could not be written.*get the right"),
        locked(tmp_path / "a.lock"),
    ):
        pass

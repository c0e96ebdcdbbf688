"""Locks between processes, on one host or through a network file system.

A lock is a flock on a file: the kernel frees it when its holder dies. Some file systems have no flock
(Lustre without `-o flock`, some FUSE mounts). There the work goes on without the lock, with one warning.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.rundir.files import refused

log = logging.getLogger("cvae.lock")

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.01, 0.5
_told: set[str] = set()  # a process warns once


def try_lock(handle: int, file: Path, shared: bool = False) -> bool:
    """Try to lock the open file `handle`; return False if another process holds the lock.

    `file` is its path, for the warning. `shared`: only a holder of an unshared lock is in the way.
    Return True without a lock if the file system has none. Raises OSError for any other failure.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_once(file, error)
    return True


def has_no_locks(file: Path) -> bool:
    """Return whether a lock of `file` was tried on a file system that has none."""
    return str(file.parent) in _told


@contextmanager
def locked(
    file: Path, shared: bool = False, keep_waiting: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Hold the lock `file` inside the `with` block; the file is created and stays.

    Raises StorageError if the file cannot be made or opened.
    `keep_waiting` is called after each failed try. It may raise, to give up with an error, or return False,
    to go on without the lock.
    """
    wait_s = FIRST_WAIT_S
    with _opened(file) as opened:
        while not try_lock(opened.fileno(), file, shared) and keep_waiting():
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        yield


def _opened(file: Path) -> TextIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return open(file, "a+")  # NFS wants a shared lock's file readable, an exclusive one's writable
    except OSError as error:
        raise refused(file, error) from error


def _warn_once(file: Path, error: OSError) -> None:
    if not _told:
        log.warning(
            "%s: this file system has no file locks (%s); going on without them. "
            "Do not start the same run, or make the same shards, twice at a time",
            file.parent, os.strerror(error.errno or 0),
        )  # fmt: skip
    _told.add(str(file.parent))

"""A session fixture that fails a test run if a process of the run outlives it.

Every process that a test starts inherits a mark in its environment, daemons included. At the end of
the run no marked process and no descendant of the test process may be left.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import suppress

import pytest

from tools.dev.chaos_parts.processes import PROC, descendants, describe

MARK = "TEST_RUN_MARK"
GRACE_S = 10.0  # what the last processes of a run may take to end
MAY_STAY = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # they end with this process


def survivors(mark: str) -> dict[int, str]:
    """Return the processes of this run that still exist, by number, with their command lines."""
    pids = set(descendants(os.getpid()))
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):  # the process ended, or belongs to another user
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                pids.add(int(folder.name))
    pids.discard(os.getpid())
    found = {pid: describe(pid) for pid in pids}
    return {pid: text for pid, text in found.items() if not any(name in text for name in MAY_STAY)}


@pytest.fixture(scope="session", autouse=True)
def _nothing_survives():
    """Fail the run if a process is left after all other fixtures of the session have ended."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    yield
    give_up = time.monotonic() + GRACE_S
    while (left := survivors(mark)) and time.monotonic() < give_up:
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"processes outlived the tests (now killed): {', '.join(left.values())}"

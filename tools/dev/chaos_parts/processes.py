"""Keep processes from outliving their parent: bind them to it, find them, end them. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)
PR_SET_CHILD_SUBREAPER = 36
PROC = Path("/proc")


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `number` to this process as soon as the thread that forked it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the new parent of every descendant whose own parent dies, so that it can be found."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int) -> list[int]:
    """Return the children of process `root`, their children, and so on.

    Zombies do not count: they run no code.
    """
    children = defaultdict(list)
    running = set()
    for folder in PROC.glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # the process ended while we looked
        state, parent = stat.rpartition(")")[2].split()[:2]
        pid = int(folder.name)
        children[int(parent)].append(pid)
        if state not in "ZX":
            running.add(pid)
    found = []
    to_visit = [root]
    while to_visit:
        below = children[to_visit.pop()]
        to_visit += below
        found += [pid for pid in below if pid in running]
    return found


def describe(pid: int) -> str:
    """Return process number and command line, for an error message."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
        if not any(words):  # it is about to run another program, or has ended
            words = [(PROC / str(pid) / "comm").read_bytes()]
    except OSError:
        words = []
    return f"{pid} ({b' '.join(words).decode(errors='replace').strip()[:200]})"


def end_descendants(grace_s: float = 0.0) -> list[str]:
    """Kill the descendants of this process that still run after `grace_s`, until none is left.

    Returns their descriptions; an empty list means that all had ended on their own. A caller that
    adopts orphans also reaches processes whose parents died before.
    """
    give_up = time.monotonic() + grace_s
    while descendants(os.getpid()) and time.monotonic() < give_up:
        time.sleep(0.05)
    killed: dict[int, str] = {}
    while left := descendants(os.getpid()):
        for pid in left:
            killed.setdefault(pid, describe(pid))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return list(killed.values())

"""One owner of a run directory: a second writer is refused, and a dead owner's place is taken.

A second process is refused only if one of two proofs says that the owner lives:
- The kernel holds the owner's lock. This works on one host always, and across hosts if the file system
  passes locks on (NFS, GPFS, Lustre with -o flock).
- The owner's heartbeat moves while we watch. This works on every file system. No clock is compared with
  another host's clock.
The kernel frees the lock of a killed process. A lock can outlive its owner, for example on a node that died
under NFS. Such a lock is broken after STALE_S without a heartbeat, or at once if the scheduler starts the
same job again. An owner that lived through this finds another name in the file and ends before it writes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import OwnedError, StorageError
from pipeline.rundir.lock import has_no_locks, try_lock

if TYPE_CHECKING:
    from pipeline.runtime.distributed import Ranks

BEAT_S = 5.0
STALE_S = 60.0  # a lock is broken after this long without a heartbeat
FILE = "owner.json"
MODE = 0o666  # less what the umask takes away
log = logging.getLogger("cvae.owner")


def start_ticks(pid: int) -> int | None:
    """Return when a process of this host started, in the kernel's ticks; None if no such process runs.

    A process id is used again after a while. Together with the start it names one process for ever.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # a dead process waits for its parent to look
    except (OSError, IndexError, ValueError):
        return None


class Ownership:
    """A run directory that this process owns; until `release` a thread writes a heartbeat every BEAT_S."""

    def __init__(self, file: Path, handle: int, who: dict[str, Any], lost: Callable[[], None]) -> None:
        self._file = file
        self._handle = handle
        self._who = who
        self._lost = lost
        self._stop = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._keep, name="owner", daemon=True)
        self._thread.start()

    def _beat(self, count: int) -> None:
        content = json.dumps({**self._who, "beat": count}).ljust(500).encode() + b"\n"
        os.pwrite(self._handle, content, 0)
        os.fsync(self._handle)

    def _keep(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_S):
            count += 1
            try:
                if _read(self._file).get("token") != self._who["token"]:
                    return self._lost()
                self._beat(count)
            except OSError as error:  # a full disk says nothing about who owns it
                log.debug("heartbeat: %s", error)

    def check(self) -> None:
        """Raise OwnedError if another process took the place, because this one stood still for STALE_S."""
        now = _read(self._file)
        if now and now.get("token") != self._who["token"]:
            raise OwnedError(
                f"{self._file.parent}: was taken over by {describe(now)} while this process stood still; "
                "this process ends"
            )

    def release(self) -> None:
        """Give the directory up; the file stays, empty."""
        self._stop.set()
        self._thread.join(BEAT_S)
        try:
            os.ftruncate(self._handle, 0)
        except OSError:
            pass
        os.close(self._handle)


def acquire(folder: Path, job: str = "", lost: Callable[[], None] = lambda: os._exit(1)) -> Ownership:
    """Own `folder`; `job` is the scheduler's name of this job, `lost` is called if the place is taken later.

    Raises OwnedError with the owner's job and host if it is alive, StorageError if it cannot write `folder`.
    """
    file = folder / FILE
    who = _this_process(job)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, MODE)
        before = _read(file)
        # The scheduler has given the last attempt of a job up when it starts that job again. The attempt may
        # still live on a node that was taken for dead.
        given_up = bool(job) and before.get("job") == job
        if not try_lock(handle, file):
            if not given_up:
                _require_dead(file, STALE_S)
            handle = _replace(file, handle)
        elif before and not given_up:
            if before.get("host") != who["host"]:  # a lock may stay on one host
                _require_dead(file, 3 * BEAT_S - _silent_s(file))
            elif has_no_locks(file):
                _require_dead(file, 0)
        gone = _read(file)
        if gone:
            log.warning("%s: its owner, %s, is gone; going on in its place", folder, describe(gone))
        return Ownership(file, handle, who, lost)
    except OSError as error:
        raise StorageError(
            f"{file}: could not be written ({error}); a run needs a directory that it may write"
        ) from None


def _this_process(job: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": start_ticks(os.getpid()),
        "job": job,
        "since": round(time.time()),
        "token": uuid.uuid4().hex,
    }


def _replace(file: Path, old: int) -> int:
    """Put a new file in the place of one whose lock outlived its owner; return its handle."""
    os.close(old)
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    handle = os.open(fresh, os.O_RDWR | os.O_CREAT, MODE)
    try_lock(handle, file)
    os.replace(fresh, file)
    return handle


def _read(file: Path) -> dict[str, Any]:
    """Return the owner that the file names, {} for none.

    The file is opened anew each time, because a network file system asks its server only then.
    """
    try:
        found = json.loads(file.read_bytes() or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _require_dead(file: Path, seconds: float) -> None:
    """Watch the heartbeat for `seconds`; raise OwnedError once it moves or its process is found here."""
    first = _read(file)
    give_up = time.monotonic() + seconds
    if first.get("host") == socket.gethostname() and first.get("started") is not None:
        if start_ticks(first.get("pid", 0)) == first["started"]:
            raise OwnedError(_refusal(file, first))
    while time.monotonic() < give_up:
        now = _read(file)
        if now and now != first:
            raise OwnedError(_refusal(file, now))
        time.sleep(0.5)


def _silent_s(file: Path) -> float:
    """Return the seconds since the last heartbeat, by the file system's own clock.

    That clock is read from the time of a new file.
    """
    probe = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    now = _modified(probe, os.O_RDWR | os.O_CREAT)
    probe.unlink()
    return now - _modified(file, os.O_RDONLY)


def _modified(file: Path, flags: int) -> float:
    handle = os.open(file, flags, MODE)  # a network file system asks its server when a file is opened
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def _refusal(file: Path, who: dict[str, Any]) -> str:
    run_dir = file.parent.parent
    return f"{run_dir}: is being trained by {describe(who)}; wait for it, cancel it, or use another name="


def describe(who: dict[str, Any]) -> str:
    """Describe an owner in words."""
    job = f"job {who['job']}, " if who.get("job") else ""
    return f"{job}process {who.get('pid', '?')} on {who.get('host', 'an unknown host')}"


@contextmanager
def owned(folder: Path, ranks: Ranks, job: str = "") -> Iterator[Ownership | None]:
    """Own `folder` inside the `with` block on rank 0; the other ranks get None (all ranks take part).

    Raises rank 0's OwnedError or StorageError on every rank.
    """
    own: Ownership | None = None
    refused: OwnedError | StorageError | None = None
    if ranks.is_main:
        try:
            own = acquire(folder, job)
        except (OwnedError, StorageError) as error:
            refused = error
    reason = ranks.text_from_main(str(refused or ""))
    if reason:
        raise refused or OwnedError(reason)
    try:
        yield own
    finally:
        if own:
            own.release()

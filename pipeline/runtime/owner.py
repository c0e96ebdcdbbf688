"""One owner of a run directory: a second process that would write there is refused; a dead owner's place is taken at once.

Two proofs that an owner lives, and a refusal only upon a proof:
- the kernel holds its flock (on this host always; across hosts where the file system passes locks on: NFS, GPFS, Lustre with -o flock);
- its heartbeat moves while we watch, for file systems that keep locks to one host. No clock is compared with another host's.
The kernel frees the lock of a killed process. A lock that outlives its owner (a node that died under NFS) is broken after STALE_S
without a heartbeat, at once where the same job of a scheduler is started anew; an owner that lived through that finds another name
in the file, and leaves before it writes again.
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
from pipeline.rundir.lock import try_lock

if TYPE_CHECKING:
    from pipeline.runtime.distributed import Ranks

BEAT_S = 5.0
STALE_S = 60.0  # a lock whose heartbeat stands still for this long is broken
FILE = "owner.json"
log = logging.getLogger("cvae.owner")


def start_ticks(pid: int) -> int | None:
    """When a process of this host started, in the kernel's ticks: with the pid it names one process for ever. None: no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


class Ownership:
    """A held run directory; the heartbeat is written every BEAT_S seconds by a thread until `release`."""

    def __init__(self, file: Path, handle: int, who: dict[str, Any], lost: Callable[[], None]) -> None:
        self._file, self._handle, self._who, self._lost = file, handle, who, lost
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
        """Raise OwnedError where another process took the place, because this one stood still for STALE_S."""
        now = _read(self._file)
        if now and now.get("token") != self._who["token"]:
            raise OwnedError(
                f"{self._file.parent}: was taken over by {describe(now)} while this process stood still; it leaves"
            )

    def release(self) -> None:
        """Give the place free; the file stays, empty."""
        self._stop.set()
        self._thread.join(BEAT_S)
        try:
            os.ftruncate(self._handle, 0)
        except OSError:
            pass
        os.close(self._handle)


def acquire(folder: Path, job: str = "", lost: Callable[[], None] = lambda: os._exit(1)) -> Ownership:
    """Own `folder`. Raises OwnedError with the owner's job and host where it is alive; `lost` is called if the place is taken later."""
    file = folder / FILE
    who = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": start_ticks(os.getpid()),
        "job": job,
        "since": round(time.time()),
    }
    who["token"] = uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        before, free = _read(file), try_lock(handle, file)
        # A scheduler that starts a job again has given its last attempt up, also one that lives on, on a node that was taken for dead.
        given_up = bool(job) and before.get("job") == job
        if not free:
            if not given_up:
                _require_dead(file, STALE_S)
            handle = _replace(file, handle)
        elif (
            before and before.get("host") != who["host"] and not given_up
        ):  # a lock kept to one host proves nothing about another
            _require_dead(file, 3 * BEAT_S - _silent_s(file))
        if before := _read(file):
            log.warning("%s: its owner, %s, is gone; going on in its place", folder, describe(before))
        return Ownership(file, handle, who, lost)
    except OSError as error:
        raise StorageError(
            f"{file}: could not be written ({error}); a run needs a directory that it may write"
        ) from None


def _replace(file: Path, old: int) -> int:
    """A fresh file under the name of one whose lock outlived its owner."""
    os.close(old)
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    handle = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o644)
    try_lock(handle, file)
    os.replace(fresh, file)
    return handle


def _read(file: Path) -> dict[str, Any]:
    """Who the file names; {} for nobody. Opened anew each time: that is when a network file system looks at the server."""
    try:
        found = json.loads(file.read_bytes() or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _require_dead(file: Path, seconds: float) -> None:
    """Watch the heartbeat for `seconds`; raise OwnedError as soon as it moves or its process is seen alive on this host."""
    first, give_up = _read(file), time.monotonic() + seconds
    if first.get("host") == socket.gethostname() and first.get("started") is not None:
        if start_ticks(first.get("pid", 0)) == first["started"]:
            raise OwnedError(_refusal(file, first))
    while time.monotonic() < give_up:
        now = _read(file)
        if now != first and now:
            raise OwnedError(_refusal(file, now))
        time.sleep(0.5)


def _silent_s(file: Path) -> float:
    """Seconds since the last heartbeat, by the file system's own clock: a fresh file's time against the heartbeat's."""
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    times = []
    for each, flags in ((fresh, os.O_RDWR | os.O_CREAT), (file, os.O_RDONLY)):
        handle = os.open(each, flags, 0o644)  # opened: a network file system then asks its server
        times.append(os.fstat(handle).st_mtime)
        os.close(handle)
    fresh.unlink()
    return times[0] - times[1]


def _refusal(file: Path, who: dict[str, Any]) -> str:
    return f"{file.parent.parent}: is being trained by {describe(who)}; wait for it, cancel it, or use another name="


def describe(who: dict[str, Any]) -> str:
    """The owner in words."""
    job = f"job {who['job']}, " if who.get("job") else ""
    return f"{job}process {who.get('pid', '?')} on {who.get('host', 'an unknown host')}"


@contextmanager
def owned(folder: Path, ranks: Ranks, job: str = "") -> Iterator[Ownership | None]:
    """Rank 0 owns `folder` inside; None on the others. Raises rank 0's OwnedError or StorageError on every rank (all ranks take part)."""
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

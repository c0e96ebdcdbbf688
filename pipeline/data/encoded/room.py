"""The place that fetched tars take in one folder, shared by all processes of a node.

Every process tells in a file of its own which tars it reads soon, and where in the stream. Whoever needs
room deletes tars that no living process names. If that is not enough: the ranks of a run wait for each
other, so the tar that its slowest rank reads next goes before those that the others read later.
A lock for the folder says who makes room; a lock for each tar says who fetches it. The kernel frees both
if a process dies.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from pipeline.rundir.files import refused
from pipeline.rundir.lock import locked, try_lock


class Wish(NamedTuple):
    """A tar that a process reads soon."""

    place: int  # in the stream, of the first sample that is read
    bytes: int


class Room:
    """At most `limit` bytes of tars in `folder`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._reader: TextIO | None = None
        self._named: dict[str, Wish] = {}  # by this process
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(folder, error) from error

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder: no other process makes room or gives a tar its name."""
        return locked(self.folder / "room.lock")

    def name(self, tars: dict[str, Wish]) -> None:
        """Tell the other processes which tars this one reads soon."""
        with self.lock():
            if self._reader is None:
                self._reader = self._introduce()
            self._reader.seek(0)
            self._reader.truncate()
            self._reader.write(json.dumps(tars))
            self._reader.flush()
            self._named = dict(tars)

    def leave(self) -> None:
        """Withdraw what this process named."""
        if self._reader is None:
            return
        with self.lock():
            Path(self._reader.name).unlink(missing_ok=True)
        self._reader.close()
        self._reader = None

    @contextmanager
    def fetching(self, tar: str) -> Iterator[bool]:
        """Try to be the one who fetches a tar inside the `with` block; say whether it worked."""
        with _held(self.folder / f"{tar}.lock") as mine:
            yield mine

    def temporary(self, tar: str) -> Path:
        """Return where a tar lies while it is fetched."""
        return self.folder / f".{tar}.tmp"

    def reserve(self, tar: str, needed: int) -> bool:
        """Make the temporary file of a tar with `needed` bytes. Tars that are read later make place.

        The caller is the one who fetches this tar. Return False if there is no room, or if this process
        does not name the tar any more: it may have been there, and used, and deleted since.
        """
        temporary = self.temporary(tar)
        temporary.unlink(missing_ok=True)  # of a process that was killed
        with self.lock():
            if tar not in self._named:
                return False
            self._drop_abandoned()
            ours, others = self._wishes()
            first = ours[tar].place
            earlier = {name: wish.bytes for name, wish in ours.items() if wish.place < first}
            ready, reserved = self._sizes("*.tar"), self._sizes(".*.tmp")
            foreign = {name: size for name, size in ready.items() if name in others}
            if sum((reserved | foreign | earlier).values()) + needed > self.limit:
                return False
            missing = sum(ready.values()) + sum(reserved.values()) + needed - self.limit
            for name in self._by_use(ready.keys() - foreign.keys() - earlier.keys(), ours):
                if missing <= 0:
                    break
                (self.folder / name).unlink(missing_ok=True)
                missing -= ready[name]
            with open(temporary, "wb") as empty:
                empty.truncate(needed)
            return True

    def _by_use(self, tars: set[str], ours: dict[str, Wish]) -> list[str]:
        """Sort tars: the oldest ones that nobody names, then the named ones that are read last."""
        nobody = [tar for tar in tars if tar not in ours]
        nobody.sort(key=lambda tar: _age(self.folder / tar))
        return nobody + sorted(tars & ours.keys(), key=lambda tar: -ours[tar].place)

    def _sizes(self, pattern: str) -> dict[str, int]:
        """Return the bytes of the tars whose files, ready or only reserved, match `pattern`."""
        sizes = {}
        for file in self.folder.glob(pattern):
            try:
                sizes[_tar_of(file)] = file.stat().st_size
            except FileNotFoundError:
                continue  # a fetch has just failed
        return sizes

    def _drop_abandoned(self) -> None:
        """Delete reserved places that no living process fills. The caller holds the folder."""
        for file in self.folder.glob(".*.tmp"):
            with self.fetching(_tar_of(file)) as nobody_else:
                if nobody_else:
                    file.unlink(missing_ok=True)

    def _introduce(self) -> TextIO:
        """Make this process's file and lock it: a file without a holder belongs to a dead process."""
        file = self.folder / f"reader-{_run()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
        opened = open(file, "a+")
        try_lock(opened.fileno(), file)
        return opened

    def _wishes(self) -> tuple[dict[str, Wish], set[str]]:
        """Return what the living processes of this run read soon, and what those of other runs do.

        The caller holds the folder. A tar that several ranks name is read where the first one reads it.
        """
        ours = dict(self._named)
        others: set[str] = set()
        for file in self.folder.glob("reader-*.json"):
            with open(file) as opened:
                if try_lock(opened.fileno(), file):
                    file.unlink()  # its process is dead
                    continue
                named = json.loads(opened.read() or "{}")
            if not file.name.startswith(f"reader-{_run()}-"):
                others |= set(named)
                continue
            for tar, wish in named.items():
                ours[tar] = min(ours.get(tar, Wish(*wish)), Wish(*wish))
        return ours, others


def _run() -> str:
    """Name the group of ranks that this process belongs to: they alone share an address and a port."""
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    alone = not all(place)
    return hashlib.sha256(f"{os.getpid() if alone else place}".encode()).hexdigest()[:8]


def _tar_of(file: Path) -> str:
    """Return the name of the tar that a file is, or holds the place of."""
    return file.name.removeprefix(".").removesuffix(".tmp")


def _age(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@contextmanager
def _held(file: Path) -> Iterator[bool]:
    """Try to hold the lock `file`; say whether it worked."""
    with open(file, "a+") as opened:
        yield try_lock(opened.fileno(), file)

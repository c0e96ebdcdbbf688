"""The place that fetched tars take in one folder, shared by all processes of a node.

Every process tells in a file of its own which tars it reads soon. Whoever needs room deletes only tars
that no living process names. A lock for the folder says who makes room; a lock for each tar says who
fetches it. The kernel frees both if a process dies.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.rundir.files import refused
from pipeline.rundir.lock import locked, try_lock


class Room:
    """At most `limit` bytes of tars in `folder`."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._reader: TextIO | None = None
        self._named: set[str] = set()  # by this process
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(folder, error) from error

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder: no other process makes room or gives a tar its name."""
        return locked(self.folder / "room.lock")

    def name(self, tars: list[str]) -> None:
        """Tell the other processes which tars this one reads soon."""
        with self.lock():
            if self._reader is None:
                self._reader = self._introduce()
            self._reader.seek(0)
            self._reader.truncate()
            self._reader.write(json.dumps(tars))
            self._reader.flush()
            self._named = set(tars)

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
        """Make the temporary file of a tar with `needed` bytes. Tars that nobody reads soon make place.

        The caller is the one who fetches this tar. Return False if there is no room, or if this process
        does not name the tar any more: it may have been there, and used, and deleted since.
        """
        temporary = self.temporary(tar)
        temporary.unlink(missing_ok=True)  # of a process that was killed
        with self.lock():
            if tar not in self._named:
                return False
            self._drop_abandoned()
            sizes = self._sizes()
            missing = sum(sizes.values()) + needed - self.limit
            kept = self._named_by_readers()
            tars = [file for file in sizes if file.suffix == ".tar" and file.name not in kept]
            for file in sorted(tars, key=_age):
                if missing <= 0:
                    break
                file.unlink(missing_ok=True)
                missing -= sizes[file]
            if missing > 0:
                return False
            with open(temporary, "wb") as reserved:
                reserved.truncate(needed)
            return True

    def _sizes(self) -> dict[Path, int]:
        """Return the bytes of every tar, and of every reserved place."""
        sizes = {}
        for file in [*self.folder.glob("*.tar"), *self.folder.glob(".*.tmp")]:
            try:
                sizes[file] = file.stat().st_size
            except FileNotFoundError:
                continue  # a fetch has just failed
        return sizes

    def _drop_abandoned(self) -> None:
        """Delete reserved places that no living process fills. The caller holds the folder."""
        for file in self.folder.glob(".*.tmp"):
            tar = file.name.removeprefix(".").removesuffix(".tmp")
            with self.fetching(tar) as nobody_else:
                if nobody_else:
                    file.unlink(missing_ok=True)

    def _introduce(self) -> TextIO:
        """Make this process's file and lock it: a file without a holder belongs to a dead process."""
        file = self.folder / f"reader-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
        opened = open(file, "a+")
        try_lock(opened.fileno(), file)
        return opened

    def _named_by_readers(self) -> set[str]:
        """Return the tars that living processes read soon. The caller holds the folder."""
        named: set[str] = set()
        for file in self.folder.glob("reader-*.json"):
            with open(file) as opened:
                if try_lock(opened.fileno(), file):
                    file.unlink()  # its process is dead
                else:
                    named |= set(json.loads(opened.read() or "[]"))
        return named


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

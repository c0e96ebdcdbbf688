"""Tars from a store in a bounded folder on a node's disk, shared by the ranks of that node.

The ranks read with a small distance. A tar that one of them reads soon stays, so each tar is fetched once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.encoded.remote import Remote
from pipeline.data.encoded.room import Room, Wish
from pipeline.data.shards import remember, verified

FETCHERS = 4  # tars that one rank fetches at a time
PATIENCE_S = 10.0  # of waiting for room; another run may hold all of it
POLL_S = 0.05  # between two looks at what other processes have done
IDLE_S = 1.0  # the same, while nothing is missing
log = logging.getLogger("cvae.cache")


class NodeCache:
    """The fetched tars of one manifest.

    `want` names the tars that are read soon; threads fetch them. `wait` returns one of them.
    """

    def __init__(self, folder: Path, limit: int, remote: Remote) -> None:
        self.folder = folder
        self.limit = limit  # bytes
        self.remote = remote
        self.room = Room(folder, limit)
        self._changed = threading.Condition()
        self._wanted: list[dict[str, Any]] = []  # manifest entries, the first one is needed first
        self._wishes = 0  # calls of `want`
        self._busy: set[str] = set()  # files that a thread of this process fetches
        self._sound: dict[str, int] = {}  # verified files -> their mtime, ns
        self._no_room: set[str] = set()
        self._given_up: set[str] = set()  # waited for in vain: their images are read one by one
        self._errors: dict[str, Exception] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False

    def want(self, wishes: list[tuple[dict[str, Any], int]]) -> None:
        """Say which tars are read soon, in that order; they replace what was said before.

        Each comes with the place in the stream where it is read first: the earliest one of all ranks of a
        run gets room first.
        """
        named = {entry["file"]: Wish(place, entry["bytes"]) for entry, place in wishes}
        self.room.name(named)
        with self._changed:
            self._wanted = [entry for entry, _ in wishes]
            self._wishes += 1
            self._no_room.clear()
            self._given_up &= named.keys()
            self._changed.notify_all()
        while len(self._threads) < FETCHERS:
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()

    def find(self, entry: dict[str, Any]) -> Path | None:
        """Return a tar that is in the folder; None if it is not there."""
        file = self.folder / entry["file"]
        try:
            stat = file.stat()
            if self._sound.get(file.name) == stat.st_mtime_ns:
                return file
            sound = stat.st_size == entry["bytes"] and verified(file, entry["sha256"], "once")
        except FileNotFoundError:
            return None  # also if another process deletes it meanwhile
        if not sound:
            file.unlink(missing_ok=True)  # an earlier run left it, and something changed it
            return None
        self._sound[file.name] = stat.st_mtime_ns
        return file

    def wait(self, entry: dict[str, Any]) -> Path | None:
        """Wait for a tar that is wanted and return it; None if there is no room for it.

        Raises DataError if it could not be fetched.
        """
        name = entry["file"]
        waited_s = 0.0
        with self._changed:
            while not self._closed:
                if name in self._errors:
                    raise self._errors[name]
                file = self.find(entry)
                if file is not None:
                    return file
                if name in self._given_up:
                    return None
                if waited_s > PATIENCE_S:
                    self._given_up.add(name)
                    text = "%s: no room for %s; its images are fetched one by one. Raise data.cache_gb"
                    log.warning(text, self.folder, name)
                    return None
                before = time.monotonic()
                self._changed.wait(POLL_S)
                # The threads stop at the first tar without room, which may be an earlier one.
                waited_s += time.monotonic() - before if self._no_room else 0.0
        return None

    def close(self) -> None:
        """Stop the threads and withdraw this rank's wishes. The tars stay for the next run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self.room.leave()

    # ---- threads of this process

    def _work(self) -> None:
        while not self._closed:
            wishes = self._wishes
            tried = fetched = False
            for entry in self._missing():
                tried = True
                fetched = self._try(entry)
                if fetched:
                    break  # what is needed first may have changed
            if not fetched:
                self._pause(wishes, POLL_S if tried else IDLE_S)

    def _pause(self, wishes: int, longest_s: float) -> None:
        """Wait until the wishes differ from number `wishes`, or until it is time to look again.

        What the other threads do wakes nobody here: they would wake each other without end, and the lock
        of the folder would hardly ever be free.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or wishes != self._wishes, longest_s)

    def _missing(self) -> Iterator[dict[str, Any]]:
        """Yield the wanted tars that are not there and that no thread of this process fetches."""
        for entry in list(self._wanted):
            name = entry["file"]
            with self._changed:
                busy = name in self._busy
                free = not busy and name not in self._errors and self.find(entry) is None
                if free:
                    self._busy.add(name)
            if busy and name in self._no_room:
                return  # one thread looks for room
            if not free:
                continue
            try:
                yield entry
            finally:
                with self._changed:
                    self._busy.discard(name)
            if name in self._no_room:
                return  # a tar that is needed later must not take the room

    def _try(self, entry: dict[str, Any]) -> bool:
        """Fetch a tar unless another rank does, or the folder has no room; return whether it did."""
        name = entry["file"]
        with self.room.fetching(name) as mine:
            if not mine or self.find(entry) is not None:
                return False
            if not self.room.reserve(name, entry["bytes"]):
                self._no_room.add(name)
                return False
            self._no_room.discard(name)
            try:
                return self._fetch(entry)
            except Exception as error:  # `wait` raises it where the tar is needed
                self._errors[name] = error
                return False
            finally:
                self.room.temporary(name).unlink(missing_ok=True)
                with self._changed:
                    self._changed.notify_all()  # `wait` may have what it waits for

    def _fetch(self, entry: dict[str, Any]) -> bool:
        """Fill the reserved place of a tar and give the tar its name; return False if closed meanwhile."""
        name = entry["file"]
        temporary = self.room.temporary(name)
        with open(temporary, "r+b") as file:
            for content in self.remote.stream(entry):
                file.write(content)
                if self._closed and file.tell() < entry["bytes"]:
                    return False
        ready = self.folder / name
        with self.room.lock():  # nobody may delete the tar before it is noted
            os.rename(temporary, ready)
            remember(ready, entry["sha256"])
            self._sound[name] = ready.stat().st_mtime_ns
        return True

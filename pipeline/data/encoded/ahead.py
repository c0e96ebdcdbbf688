"""Which tars the stream of samples reads next: what the cache must hold, and what it may fetch ahead."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.data.order import Stream


class Use(NamedTuple):
    """One epoch's use of one shard, as positions in the stream."""

    first: int
    last: int
    shard: int


class Ahead:
    """Follows a stream and lists the shards that it reads from now on, the nearest first.

    `bytes_of` [n_shards] are their sizes. The list ends where `limit` bytes are reached.
    """

    def __init__(self, stream: Stream, bytes_of: list[int], limit: int) -> None:
        self.stream = stream
        self.bytes_of = bytes_of
        self.limit = limit
        self._uses: list[Use] = []
        self._epochs = range(0)  # whose uses were listed

    def at(self, position: int) -> dict[int, int]:
        """Return the shards that are read at `position` of the stream or soon after it.

        The value of each is where the stream reads it first; what it has begun to read may lie behind.
        """
        epoch = position // self.stream.total
        if epoch not in self._epochs:
            self._uses = []
            self._epochs = range(epoch, epoch)
        while self._epochs.stop < epoch + 2:
            self._uses += self._uses_in(self._epochs.stop)
            self._epochs = range(self._epochs.start, self._epochs.stop + 1)
        self._uses = [use for use in self._uses if use.last >= position]
        shards: dict[int, int] = {}
        room = self.limit
        for use in self._uses:
            if use.shard in shards:
                continue
            room -= self.bytes_of[use.shard]
            if room < 0:
                break
            shards[use.shard] = use.first
        return shards

    def _uses_in(self, epoch: int) -> list[Use]:
        total = self.stream.total
        start = epoch * total
        order = self.stream.indices(range(start, start + total))
        shard_of = np.searchsorted(self.stream.bounds, order, side="right") - 1
        places = np.arange(start, start + total)
        first = np.zeros(len(self.bytes_of), np.int64)
        last = np.zeros(len(self.bytes_of), np.int64)
        first[shard_of[::-1]] = places[::-1]  # of several values for one element the last one stays
        last[shard_of] = places
        shards = range(len(self.bytes_of))
        uses = [Use(int(first[shard]), int(last[shard]), shard) for shard in shards]
        return sorted(uses)


def least_room(bytes_of: list[int], shards_at_once: int) -> int:
    """Return the bytes of the shards that one batch may read: two groups that are mixed."""
    largest = sorted(bytes_of, reverse=True)
    return sum(largest[: 2 * shards_at_once])

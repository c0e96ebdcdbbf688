"""The order and the random numbers of a training: pure functions of the seed, for any number of ranks.

The order of samples is that of epoch 0, epoch 1, ... end to end. Step s takes its elements [s B, (s+1) B),
and rank r of W takes its share of those. `positions` below are such elements.

    1  noise and flips are drawn for a whole batch, and an epoch is shuffled as a whole: the cost of a rank
       grows with the number of ranks
    2  each rank computes the numbers of its own positions only

A checkpoint holds the number of its stream. Old runs and the classifier continue with stream 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from pipeline.runtime.keyed import generator, normal_rows, raw_rows, uniform_rows
from pipeline.runtime.shuffle import ROUNDS, shuffled

FIRST_STREAM, NEWEST_STREAM = 1, 2


class Stream(ABC):
    """The endless stream of samples, and the random numbers that belong to each of its positions.

    Shards come in random order. Samples are shuffled within blocks of `shards_at_once` shards, so that
    a cold disk reads forward. `bounds` [n_shards + 1] are cumulative sample counts.
    """

    def __init__(self, bounds: np.ndarray, seed: int, shards_at_once: int, batch_size: int) -> None:
        self.bounds = bounds
        self.seed = seed
        self.shards_at_once = shards_at_once
        self.batch_size = batch_size
        self.total = int(bounds[-1])

    def indices(self, positions: range) -> np.ndarray:
        """Return the samples at these positions, int64 [b]."""
        parts = [np.zeros(0, np.int64)]
        start = positions.start
        while start < positions.stop:
            epoch, offset = divmod(start, self.total)
            part = self.of_epoch(epoch, offset, min(self.total, offset + positions.stop - start))
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    @abstractmethod
    def of_epoch(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of one epoch, or the first few of them, int64."""

    @abstractmethod
    def augmentation(self, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers in [0, 1) that decide about flips, and numbers in [-1, 1) for angles, [b] each."""

    @abstractmethod
    def noise(self, positions: range, width: int) -> np.ndarray:
        """Return standard normal numbers, float32 [b, width]."""


class WholeBatchStream(Stream):
    """Stream 1: numbers are drawn for the whole global batch and sliced.

    The first k numbers of a generator differ with the shape that is asked for.
    """

    def __init__(self, bounds: np.ndarray, seed: int, shards_at_once: int, batch_size: int) -> None:
        super().__init__(bounds, seed, shards_at_once, batch_size)
        self._plans: dict[int, np.ndarray] = {}  # of the epochs that a step touches

    def of_epoch(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of one epoch."""
        if epoch not in self._plans:
            before = epoch - 1
            self._plans = {before: self._plans[before]} if before in self._plans else {}
            self._plans[epoch] = self._plan(epoch)
        return self._plans[epoch][start:stop]

    def _plan(self, epoch: int) -> np.ndarray:
        """Return a permutation of all samples, int64 [N]."""
        rng = generator(self.seed, "order", epoch)
        shards = rng.permutation(len(self.bounds) - 1)
        blocks = []
        for first in range(0, len(shards), self.shards_at_once):
            block = shards[first : first + self.shards_at_once]
            samples = [np.arange(self.bounds[shard], self.bounds[shard + 1]) for shard in block]
            blocks.append(rng.permutation(np.concatenate(samples)))
        return np.concatenate(blocks)

    def _in_batch(self, positions: range) -> tuple[int, slice]:
        step, first = divmod(positions.start, self.batch_size)
        return step, slice(first, first + len(positions))

    def augmentation(self, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """Draw for the whole batch, return the part of `positions`."""
        step, mine = self._in_batch(positions)
        rng = generator(self.seed, "augment", step)
        flips = rng.random(self.batch_size)
        angles = rng.uniform(-1, 1, self.batch_size)
        return flips[mine], angles[mine]

    def noise(self, positions: range, width: int) -> np.ndarray:
        """Draw for the whole batch, return the part of `positions`."""
        step, mine = self._in_batch(positions)
        shape = (self.batch_size, width)
        return generator(self.seed, "noise", step).standard_normal(shape, dtype=np.float32)[mine]


class KeyedStream(Stream):
    """Stream 2: every number is computed from its position, so a rank's cost depends on its share only."""

    def __init__(self, bounds: np.ndarray, seed: int, shards_at_once: int, batch_size: int) -> None:
        super().__init__(bounds, seed, shards_at_once, batch_size)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of `epoch`, and where each of them begins and the last one ends."""
        if epoch not in self._orders:
            before = epoch - 1
            self._orders = {before: self._orders[before]} if before in self._orders else {}
            shards = generator(self.seed, "shards", epoch).permutation(len(self.bounds) - 1)
            begins = np.concatenate(([0], np.cumsum(np.diff(self.bounds)[shards])))
            self._orders[epoch] = shards, begins
        return self._orders[epoch]

    def of_epoch(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of one epoch, at most to the end of their block of shards."""
        shards, begins = self._order(epoch)
        shard = int(np.searchsorted(begins, start, side="right")) - 1
        first = shard - shard % self.shards_at_once
        last = min(len(shards), first + self.shards_at_once)
        low, high = int(begins[first]), int(begins[last])

        number = epoch * len(shards) + first  # of this block among the blocks of all epochs
        keys = raw_rows(self.seed, "samples", range(number, number + 1), ROUNDS).astype(np.uint32)[0]
        inside = shuffled(np.arange(start - low, min(stop, high) - low), high - low, keys)
        places = inside + low
        of = np.searchsorted(begins, places, side="right") - 1
        return self.bounds[shards[of]] + places - begins[of]

    def augmentation(self, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """Compute two numbers for each position."""
        both = uniform_rows(self.seed, "augmentation", positions, 2)
        return both[:, 0], 2 * both[:, 1] - 1

    def noise(self, positions: range, width: int) -> np.ndarray:
        """Compute `width` numbers for each position."""
        return normal_rows(self.seed, "encoder noise", positions, width)


STREAMS: dict[int, type[Stream]] = {FIRST_STREAM: WholeBatchStream, NEWEST_STREAM: KeyedStream}

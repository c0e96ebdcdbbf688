"""The order of samples: a pure function of the seed, whatever the ranks, workers and restarts.

The stream is plan(epoch 0), plan(epoch 1), ... end to end. Step s takes its elements [s B, (s+1) B),
and rank r of W takes its share of those.
"""

from __future__ import annotations

import numpy as np

from pipeline.runtime.keyed import generator


def plan(bounds: np.ndarray, seed: int, epoch: int, shards_at_once: int) -> np.ndarray:
    """Return a permutation of all samples, int64 [N].

    Shards come in random order. Samples are shuffled within blocks of `shards_at_once` shards, so that
    a cold disk reads forward. `bounds` [n_shards + 1] are cumulative sample counts.
    """
    rng = generator(seed, "order", epoch)
    shards = rng.permutation(len(bounds) - 1)
    shuffled = []
    for first in range(0, len(shards), shards_at_once):
        block = shards[first : first + shards_at_once]
        samples = [np.arange(bounds[shard], bounds[shard + 1]) for shard in block]
        shuffled.append(rng.permutation(np.concatenate(samples)))
    return np.concatenate(shuffled)


class Stream:
    """The endless stream of sample positions. It remembers the epochs that a step touches."""

    def __init__(self, bounds: np.ndarray, seed: int, shards_at_once: int) -> None:
        self.bounds = bounds
        self.seed = seed
        self.shards_at_once = shards_at_once
        self.total = int(bounds[-1])
        self._plans: dict[int, np.ndarray] = {}

    def _plan(self, epoch: int) -> np.ndarray:
        if epoch not in self._plans:
            before = epoch - 1
            self._plans = {before: self._plans[before]} if before in self._plans else {}
            self._plans[epoch] = plan(self.bounds, self.seed, epoch, self.shards_at_once)
        return self._plans[epoch]

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the stream, int64."""
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.total)
            part = self._plan(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

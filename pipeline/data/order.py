"""The order of samples, a pure function of the seed: not of ranks, workers or restarts.

The stream is plan(epoch 0), plan(epoch 1), ... end to end; step s takes its elements [s B, (s+1) B), rank r of W its share of those.
"""

from __future__ import annotations

import numpy as np

from pipeline.runtime.keyed import generator


def plan(bounds: np.ndarray, seed: int, epoch: int, shards_at_once: int) -> np.ndarray:
    """Permutation of all samples [N], int64: shards in random order, shuffled over `shards_at_once` of them at a time.

    `bounds` [n_shards + 1]: cumulative sample counts. Block by block, so that a cold disk reads forward.
    """
    rng = generator(seed, "order", epoch)
    shards = rng.permutation(len(bounds) - 1)
    blocks = [shards[i : i + shards_at_once] for i in range(0, len(shards), shards_at_once)]
    return np.concatenate(
        [
            rng.permutation(np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in block]))
            for block in blocks
        ]
    )


class Stream:
    """The endless stream of sample indices; remembers the epochs that a step touches."""

    def __init__(self, bounds: np.ndarray, seed: int, shards_at_once: int) -> None:
        self.bounds, self.seed, self.shards_at_once = bounds, seed, shards_at_once
        self.total = int(bounds[-1])
        self._plans: dict[int, np.ndarray] = {}

    def _plan(self, epoch: int) -> np.ndarray:
        if epoch not in self._plans:
            self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1}
            self._plans[epoch] = plan(self.bounds, self.seed, epoch, self.shards_at_once)
        return self._plans[epoch]

    def take(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the stream, int64."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.total)
            part = self._plan(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

"""Split a number of items into parts."""

from __future__ import annotations

import numpy as np


def ceil_div(total: int, size: int) -> int:
    """Return how many parts of at most `size` items `total` items need."""
    return -(-total // size)


def share(total: int, rank: int, world_size: int) -> range:
    """Return the positions [floor(r T/W), floor((r+1) T/W)) of `total` items that belong to `rank`.

    The range may be empty.
    """
    return range(rank * total // world_size, (rank + 1) * total // world_size)


def spread(n: int, total: int) -> np.ndarray:
    """Return `n` of `total` positions, evenly spaced, so that no order within a split can bias them."""
    return np.arange(n) * total // n

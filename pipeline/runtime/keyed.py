"""Random numbers that depend on (seed, purpose, index) alone: the same on any number of ranks.

`generator` starts one generator for each index. `*_rows` draw many rows at once, which training needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.split import ceil_div


def key(seed: int, purpose: str) -> np.ndarray:
    """Return the 128-bit key of one stream, as two uint64."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8")


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Return the generator of element `index` of one stream, independent of all others.

    Philox is counter-based, so a generator costs little to start.
    """
    return np.random.Generator(np.random.Philox(key=key(seed, purpose), counter=[0, 0, 0, index]))


def keyed_normal(seed: int, purpose: str, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal float32 [n, *shape]; row i depends on (seed, purpose, indices[i]) alone."""
    rows = [generator(seed, purpose, int(i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, *shape), np.float32))


def raw_rows(seed: int, purpose: str, rows: range, words: int) -> np.ndarray:
    """Return random bits, uint64 [len(rows), words]; row i depends on (seed, purpose, rows[i]) alone.

    Philox turns a counter into four words. Each row has its own counters, so rows cost the same wherever they
    lie, and one call draws all of them.
    """
    blocks = ceil_div(words, 4)  # of a row
    if not rows or not words:
        return np.zeros((len(rows), words), np.uint64)
    bits = np.random.Philox(key=key(seed, purpose), counter=[rows.start * blocks, 0, 0, 0])
    return bits.random_raw(len(rows) * 4 * blocks).reshape(len(rows), -1)[:, :words]


def uniform_rows(seed: int, purpose: str, rows: range, width: int) -> np.ndarray:
    """Return uniform numbers in [0, 1), float64 [len(rows), width]; see `raw_rows`."""
    return (raw_rows(seed, purpose, rows, width) >> np.uint64(11)) * 2.0**-53


def normal_rows(seed: int, purpose: str, rows: range, width: int) -> np.ndarray:
    """Return standard normal numbers, float32 [len(rows), width]; see `raw_rows`.

    Box and Muller: two uniform numbers of 32 bits give two normal ones.
    """
    words = 4 * ceil_div(width, 8)
    bits = np.ascontiguousarray(raw_rows(seed, purpose, rows, words)).view(np.uint32)
    first, second = bits[:, :words].astype(np.float32), bits[:, words:].astype(np.float32)
    radius = np.sqrt(-2 * np.log(first * np.float32(2.0**-32) + np.float32(2.0**-33)))
    angle = second * np.float32(2 * np.pi * 2.0**-32)
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)[:, :width]

"""Random numbers that depend on (seed, purpose, index) alone: the same on any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


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

"""Random numbers as a pure function of (seed, purpose, index): the same on any number of ranks, in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def key(seed: int, purpose: str) -> np.ndarray:
    """128-bit key of one stream, as two uint64."""
    return np.frombuffer(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], dtype="<u8")


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Independent generator of element `index` of one stream; Philox is counter-based, so starting one is cheap."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose), counter=[0, 0, 0, index]))


def keyed_normal(seed: int, purpose: str, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [n, *shape]; row i depends on (seed, purpose, indices[i]) alone."""
    rows = [generator(seed, purpose, int(i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, *shape), np.float32))

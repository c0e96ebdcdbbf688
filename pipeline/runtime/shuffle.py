"""A permutation that is computed element by element, so nobody has to hold or draw the whole of it."""

from __future__ import annotations

import numpy as np

ROUNDS = 6
MIN_BITS = 6  # fewer bits mix badly
FACTOR_1, FACTOR_2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
SHIFT = np.uint32(15)


def shuffled(positions: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return where a pseudo-random permutation of range(n) sends `positions` [k], int64 [k].

    `keys`: ROUNDS random uint32 that choose the permutation; n is at most 2^32. It is a Feistel network
    (Luby and Rackoff, 1988) on a power of two that holds n. An image outside of range(n) is sent on until it
    lies inside, which keeps the map one to one.
    """
    bits = max(MIN_BITS, (n - 1).bit_length())
    images = _feistel(positions.astype(np.uint32), bits, keys)
    outside = np.flatnonzero(images >= n)
    while len(outside):
        images[outside] = _feistel(images[outside], bits, keys)
        outside = outside[images[outside] >= n]
    return images.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute numbers of `bits` bits, uint32 [k]. The two parts may differ by one bit."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = x >> np.uint32(right_bits), x & np.uint32((1 << right_bits) - 1)
    for key in keys:
        mixed = (right ^ key) * FACTOR_1
        mixed ^= mixed >> SHIFT
        mixed *= FACTOR_2
        mixed ^= mixed >> SHIFT
        mask = np.uint32((1 << left_bits) - 1)
        left, right = right, left ^ (mixed & mask)
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint32(right_bits)) | right

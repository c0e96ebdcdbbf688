"""Pairs of attributes that hardly ever meet: whether a model can put together what it saw apart."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from pipeline.runtime.keyed import generator

MIN_TRAIN, MIN_HELD_OUT = 50, 20  # images that a pair needs: else it is rather a labelling error
EXCLUSIVE = ({"Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"}, {"Straight_Hair", "Wavy_Hair"})  # one head has one of each


class Pair(NamedTuple):
    """Two attributes and how often they occur together."""

    attributes: tuple[str, str]
    train_count: int
    held_out_count: int
    lift: float  # p(a, b) / (p(a) p(b)) in the training split; below 1: they avoid each other


def rare_pairs(train: np.ndarray, held_out: np.ndarray, names: list[str], most: int = 10) -> list[Pair]:
    """The pairs of `names` with the lowest lift, from labels [N, A] and [M, A] in {0, 1}; lowest first."""
    together, held_out_together = (labels.astype(np.float64).T @ labels for labels in (train, held_out))
    alone = together.diagonal()
    pairs = []
    for a, b in combinations(range(len(names)), 2):
        if together[a, b] >= MIN_TRAIN and held_out_together[a, b] >= MIN_HELD_OUT and names[b] not in rivals(names[a]):
            lift = float(together[a, b] * len(train) / (alone[a] * alone[b]))
            pairs.append(Pair((names[a], names[b]), int(together[a, b]), int(held_out_together[a, b]), lift))
    return sorted((pair for pair in pairs if pair.lift < 1), key=lambda pair: (pair.lift, pair.attributes))[:most]


def rivals(name: str) -> set[str]:
    """Attributes that contradict `name`."""
    return set().union(*(group - {name} for group in EXCLUSIVE if name in group))


def requests(labels: np.ndarray, names: list[str], attributes: tuple[str, str], n: int, seed: int) -> np.ndarray:
    """Attributes [n, A] to ask for: rows drawn from `labels` [N, A], with the two `attributes` set and what contradicts them unset."""
    drawn = labels[generator(seed, "rare/" + "+".join(attributes), 0).integers(len(labels), size=n)].copy()
    drawn[:, [names.index(name) for name in attributes]] = 1
    drawn[:, [i for i, name in enumerate(names) if name in rivals(attributes[0]) | rivals(attributes[1])]] = 0
    return drawn

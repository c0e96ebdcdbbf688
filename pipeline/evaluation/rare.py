"""Rare combinations of attributes: can a model put together what it saw apart?"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from pipeline.runtime.keyed import generator

MIN_TRAIN, MIN_HELD_OUT = 50, 20  # images that a combination needs; with fewer, a labelling error is likely
MOST = 10  # pairs, and triples
EXCLUSIVE = (
    {"Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"},
    {"Straight_Hair", "Wavy_Hair"},
)  # one head has one of each
FIGURE_5 = (("Heavy_Makeup", "Male"),)  # the case that arXiv 2511.08946 shows; too few images for a ceiling


class Combination(NamedTuple):
    """Two or three attributes and how often they occur together."""

    attributes: tuple[str, ...]
    annotated_count: int  # in the annotations of the whole training partition, even if an image is missing
    train_count: int
    held_out_count: int
    lift: float  # p(a, b, ...) / (p(a) p(b) ...) in these annotations; below 1 they avoid each other


class Counts:
    """How often attributes occur together, in three sets of labels uint8 [N, A]."""

    def __init__(
        self, annotated: np.ndarray, train: np.ndarray, held_out: np.ndarray, names: list[str]
    ) -> None:
        self.names, self.n = names, len(annotated)
        # Bits run along images. An AND and a popcount count a combination: 9,880 triples take a
        # second.
        self.packed = [np.packbits(labels.astype(bool).T, axis=1) for labels in (annotated, train, held_out)]
        self.alone = annotated.mean(0, dtype=np.float64)

    def of(self, chosen: tuple[int, ...]) -> Combination:
        """Count one combination, given by its columns."""
        annotated, train, held_out = (_count(bits, chosen) for bits in self.packed)
        expected = self.n * float(np.prod(self.alone[list(chosen)]))
        return Combination(
            attributes=tuple(self.names[i] for i in chosen),
            annotated_count=annotated,
            train_count=train,
            held_out_count=held_out,
            lift=annotated / expected if expected else 0.0,
        )

    def rare(self, size: int, most: int = MOST) -> list[tuple[int, ...]]:
        """Return the combinations of `size` attributes with the lowest lift below 1, lowest first,
        as columns.

        At least 50 training and 20 held-out images carry each of them, and none contradicts itself.
        """
        names = self.names
        pairs = {
            (a, b)
            for a, b in combinations(range(len(names)), 2)
            if names[b] not in rivals(names[a]) and self._enough((a, b))
        }
        found = []
        for chosen in combinations(range(len(names)), size):
            if all(pair in pairs for pair in combinations(chosen, 2)) and self._enough(chosen):
                found.append((self.of(chosen), chosen))
        ordered = sorted((c.lift, c.attributes, chosen) for c, chosen in found if c.lift < 1)
        return [chosen for _, _, chosen in ordered[:most]]

    def _enough(self, chosen: tuple[int, ...]) -> bool:
        train, held_out = (_count(bits, chosen) for bits in self.packed[1:])
        return train >= MIN_TRAIN and held_out >= MIN_HELD_OUT


def _count(bits: np.ndarray, chosen: tuple[int, ...]) -> int:
    """Number of images with all chosen attributes, from bits [A, N / 8]."""
    together = np.bitwise_and.reduce(bits[list(chosen)])
    return int(np.bitwise_count(together).sum())


def rivals(name: str) -> set[str]:
    """Return the attributes that contradict `name`."""
    return set().union(*(group - {name} for group in EXCLUSIVE if name in group))


def requests(
    labels: np.ndarray, names: list[str], attributes: tuple[str, ...], n: int, seed: int
) -> np.ndarray:
    """Draw `n` rows from `labels` [N, A], set `attributes` in them and unset what contradicts these
    -> uint8 [n, A].
    """
    rng = generator(seed, "rare/" + "+".join(attributes), 0)
    drawn = labels[rng.integers(len(labels), size=n)].copy()
    drawn[:, [names.index(name) for name in attributes]] = 1
    against = set().union(*(rivals(name) for name in attributes))
    drawn[:, [i for i, name in enumerate(names) if name in against]] = 0
    return drawn

"""Attributes that hardly ever meet: whether a model can put together what it saw apart."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from pipeline.runtime.keyed import generator

MIN_TRAIN, MIN_HELD_OUT = 50, 20  # images that a combination needs: else it is rather a labelling error
MOST = 10  # pairs, and triples
EXCLUSIVE = (
    {"Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"},
    {"Straight_Hair", "Wavy_Hair"},
)  # one head has one of each
FIGURE_5 = (("Heavy_Makeup", "Male"),)  # the case that arXiv 2511.08946 shows; too few images for a ceiling


class Combination(NamedTuple):
    """Two or three attributes and how often they occur together."""

    attributes: tuple[str, ...]
    annotated_count: (
        int  # in the annotations of the whole training partition, whether or not the image is there
    )
    train_count: int
    held_out_count: int
    lift: float  # p(a, b, ...) / (p(a) p(b) ...) in these annotations; below 1: they avoid each other


class Counts:
    """How often attributes occur together, in three sets of labels uint8 [N, A]."""

    def __init__(
        self, annotated: np.ndarray, train: np.ndarray, held_out: np.ndarray, names: list[str]
    ) -> None:
        self.names, self.n = names, len(annotated)
        # Bits along images: a combination is counted by an AND and a popcount, 9,880 triples in a second.
        self.packed = [np.packbits(labels.astype(bool).T, axis=1) for labels in (annotated, train, held_out)]
        self.alone = annotated.mean(0, dtype=np.float64)

    def of(self, chosen: tuple[int, ...]) -> Combination:
        """The counts of one combination, given by columns."""
        counts = [
            int(np.bitwise_count(np.bitwise_and.reduce(bits[list(chosen)])).sum()) for bits in self.packed
        ]
        expected = self.n * float(np.prod(self.alone[list(chosen)]))
        annotated, train, held_out = counts
        return Combination(
            tuple(self.names[i] for i in chosen),
            annotated,
            train,
            held_out,
            annotated / expected if expected else 0.0,
        )

    def rare(self, size: int, most: int = MOST) -> list[tuple[int, ...]]:
        """Combinations of `size` attributes with the lowest lift below 1, as columns; lowest first.

        Only those that at least 50 training and 20 held-out images carry, and that do not contradict themselves.
        """
        names = self.names
        pairs = {
            (a, b)
            for a, b in combinations(range(len(names)), 2)
            if names[b] not in rivals(names[a]) and self._enough((a, b))
        }
        able = [
            c
            for c in combinations(range(len(names)), size)
            if all(pair in pairs for pair in combinations(c, 2))
        ]
        found = [(self.of(chosen), chosen) for chosen in able if self._enough(chosen)]
        ordered = sorted((c.lift, c.attributes, chosen) for c, chosen in found if c.lift < 1)
        return [chosen for _, _, chosen in ordered[:most]]

    def _enough(self, chosen: tuple[int, ...]) -> bool:
        counts = [
            int(np.bitwise_count(np.bitwise_and.reduce(bits[list(chosen)])).sum()) for bits in self.packed[1:]
        ]
        return counts[0] >= MIN_TRAIN and counts[1] >= MIN_HELD_OUT


def rivals(name: str) -> set[str]:
    """Attributes that contradict `name`."""
    return set().union(*(group - {name} for group in EXCLUSIVE if name in group))


def requests(
    labels: np.ndarray, names: list[str], attributes: tuple[str, ...], n: int, seed: int
) -> np.ndarray:
    """Attributes [n, A] to ask for: rows drawn from `labels` [N, A], with the `attributes` set and what contradicts them unset."""
    drawn = labels[generator(seed, "rare/" + "+".join(attributes), 0).integers(len(labels), size=n)].copy()
    drawn[:, [names.index(name) for name in attributes]] = 1
    against = set().union(*(rivals(name) for name in attributes))
    drawn[:, [i for i, name in enumerate(names) if name in against]] = 0
    return drawn

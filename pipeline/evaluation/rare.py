"""Attributes that hardly ever occur together: can a model combine what it never or rarely saw combined?"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from pipeline.runtime.keyed import generator

MIN_TRAIN = 50  # images that a combination needs; below this it is more likely a labelling error
MIN_HELD_OUT = 20
MOST = 10  # pairs, and triples
Groups = tuple[tuple[str, ...], ...]  # groups of attributes of which an image has at most one


class Combination(NamedTuple):
    """Two or three attributes and how often they occur together."""

    attributes: tuple[str, ...]
    annotated_count: int  # in all annotated training images, whether or not the image is there
    train_count: int
    held_out_count: int
    lift: float  # p(a, b, ...) / (p(a) p(b) ...) in these annotations; below 1 they avoid each other


class Counts:
    """How often attributes occur together, in three sets of labels uint8 [N, A].

    `exclusive` are groups of attributes that contradict each other.
    """

    def __init__(
        self,
        annotated: np.ndarray,
        train: np.ndarray,
        held_out: np.ndarray,
        names: list[str],
        exclusive: Groups = (),
    ) -> None:
        self.names = names
        self.exclusive = exclusive
        self.n = len(annotated)
        # Bits run along images: a combination is counted by an AND and a popcount. One second is enough
        # for the 9,880 triples of 40 attributes.
        self.packed = [np.packbits(labels.astype(bool).T, axis=1) for labels in (annotated, train, held_out)]
        self.alone = annotated.mean(0, dtype=np.float64)

    def of(self, chosen: tuple[int, ...]) -> Combination:
        """Return the counts of one combination, given by positions of attributes."""
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
        """Return the combinations of `size` attributes with the lowest lift below 1, as positions.

        At least MIN_TRAIN training and MIN_HELD_OUT held-out images carry each of them, and none
        contradicts itself. The lowest lift comes first.
        """
        pairs = {pair for pair in combinations(range(len(self.names)), 2) if self._may_meet(*pair)}
        found = []
        for chosen in combinations(range(len(self.names)), size):
            if not all(pair in pairs for pair in combinations(chosen, 2)) or not self._enough(chosen):
                continue
            combination = self.of(chosen)
            if combination.lift < 1:
                found.append((combination.lift, combination.attributes, chosen))
        return [chosen for _, _, chosen in sorted(found)[:most]]

    def _may_meet(self, a: int, b: int) -> bool:
        contradicts = self.names[b] in rivals(self.names[a], self.exclusive)
        return not contradicts and self._enough((a, b))

    def _enough(self, chosen: tuple[int, ...]) -> bool:
        _, train, held_out = self.packed
        return _count(train, chosen) >= MIN_TRAIN and _count(held_out, chosen) >= MIN_HELD_OUT


def _count(bits: np.ndarray, chosen: tuple[int, ...]) -> int:
    """Return how many images carry all of the chosen attributes; `bits` uint8 [A, N / 8]."""
    together = np.bitwise_and.reduce(bits[list(chosen)])
    return int(np.bitwise_count(together).sum())


def rivals(name: str, exclusive: Groups) -> set[str]:
    """Return the attributes that contradict `name`."""
    found: set[str] = set()
    for group in exclusive:
        if name in group:
            found |= set(group) - {name}
    return found


def purpose_of(attributes: tuple[str, ...]) -> str:
    """Return the name of the random numbers of samples that are asked for `attributes`."""
    return "rare/" + "+".join(attributes)


def requests(
    labels: np.ndarray,
    names: list[str],
    attributes: tuple[str, ...],
    n: int,
    seed: int,
    exclusive: Groups = (),
) -> np.ndarray:
    """Return attributes to ask for, uint8 [n, A].

    Rows are drawn from `labels` [N, A]. Then `attributes` are set, and what contradicts them is unset.
    """
    rng = generator(seed, purpose_of(attributes), 0)
    drawn = labels[rng.integers(len(labels), size=n)].copy()
    drawn[:, [names.index(name) for name in attributes]] = 1
    against: set[str] = set()
    for name in attributes:
        against |= rivals(name, exclusive) - set(attributes)
    drawn[:, [i for i, name in enumerate(names) if name in against]] = 0
    return drawn

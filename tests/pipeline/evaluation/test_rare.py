"""Rare combinations: frequent enough, avoiding each other, without contradictions."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.rare import Combination, Counts, requests

EXCLUSIVE = (("Straight_Hair", "Wavy_Hair"),)


def rarest(labels: np.ndarray, held_out: np.ndarray, names: list[str], size: int = 2) -> list[Combination]:
    counts = Counts(labels, labels, held_out, names, EXCLUSIVE)
    return [counts.of(chosen) for chosen in counts.rare(size)]


def test_rare_pairs_are_frequent_enough_and_avoid_each_other() -> None:
    labels = np.zeros((1000, 3), np.uint8)
    labels[:500, 0] = labels[440:, 1] = labels[::2, 2] = (
        1  # a and b meet 60 times where 280 are expected; c is independent
    )
    pairs = rarest(labels, labels[300:600], ["a", "b", "c"])
    assert (
        pairs[0].attributes == ("a", "b")
        and pairs[0].annotated_count == pairs[0].train_count == pairs[0].held_out_count == 60
    )
    assert pairs[0].lift == pytest.approx(60 * 1000 / (500 * 560))
    assert not rarest(labels, labels[:100], ["a", "b", "c"])  # held out: they never meet
    asked = requests(labels, ["a", "b", "c"], ("a", "b"), 50, seed=0)
    assert asked[:, :2].all() and 0 < asked[:, 2].mean() < 1 and len(asked) == 50
    assert not labels[600:, 0].any()  # the labels themselves are left alone


def test_contradictions_are_neither_chosen_nor_asked_for() -> None:
    labels = np.zeros((1000, 3), np.uint8)
    labels[:500, 0] = labels[440:, 1] = labels[::2, 2] = 1
    names = ["Straight_Hair", "Wavy_Hair", "Male"]
    assert ("Straight_Hair", "Wavy_Hair") not in [pair.attributes for pair in rarest(labels, labels, names)]
    asked = requests(labels, names, ("Wavy_Hair", "Male"), 50, 0, EXCLUSIVE)
    assert asked[:, 1:].all() and not asked[:, 0].any()
    against_each_other = requests(labels, names, ("Straight_Hair", "Wavy_Hair"), 50, 0, EXCLUSIVE)
    assert against_each_other[:, :2].all()  # a showcase that somebody asked for by name

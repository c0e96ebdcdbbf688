"""Variants in a comparison, and which of their differences exceed the noise."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.reporting.entries import Entry, comparable, direction
from pipeline.reporting.seeds import Difference, by_variant, several_seeds, variant_differences
from pipeline.reporting.text import number

ONE_SEED = (
    "Each variant was trained once, so the intervals hold the luck of the images and samples, not that of"
    " the training: a sweep over seeds tells them apart."
)
SEVERAL_SEEDS = "Judged by paired differences over the seeds that two variants share (p below 0.05, Holm)."


@dataclass(frozen=True)
class Variant:
    """One column of a comparison: a run, or the runs of one configuration over several seeds."""

    name: str
    entries: list[Entry]

    def values(self, metric: str) -> list[float]:
        """The values of all its runs that have the metric."""
        known = [entry.evaluation.metrics.get(metric) for entry in self.entries]
        return [value for value in known if value is not None]

    def mean(self, metric: str) -> float | None:
        """The mean over its runs; None if no run has the metric."""
        values = self.values(metric)
        return statistics.mean(values) if values else None

    def half_width(self, metric: str) -> float | None:
        """Half of the 95 % interval of a single run; None for several, or without an interval."""
        if len(self.entries) > 1:
            return None
        interval = self.entries[0].evaluation.intervals.get(metric)
        return (interval[1] - interval[0]) / 2 if interval else None

    def text(self, metric: str) -> str:
        """The value with its noise: half of the interval, or the deviation over seeds."""
        value, half = self.mean(metric), self.half_width(metric)
        values = self.values(metric)
        if half is None and len(values) > 1:
            half = statistics.stdev(values)
        return number(value) + (f" ±{half:.2g}" if half is not None else "")


class Ranking(NamedTuple):
    """What the variants' values of one metric tell."""

    metric: str
    best: Variant | None  # better than every other one by more than the noise
    clearly: list[tuple[Variant, Variant]]  # (better, worse) pairs beyond the noise
    judged: bool  # whether the noise is known


def variants(group: list[Entry]) -> list[Variant]:
    """Return the columns of a group: one for each run, or for each configuration with several seeds."""
    if not several_seeds(group):
        return [Variant(entry.name, [entry]) for entry in group]
    return [Variant(name, entries) for name, entries in by_variant(group).items()]


def rankings(group: list[Entry], metrics: list[str]) -> list[Ranking]:
    """Rank the variants in every metric that has a direction and may be compared."""
    columns, found = variants(group), []
    differences = variant_differences(group)
    for metric in metrics:
        of_metric = [difference for difference in differences if difference.metric == metric]
        if direction(group, metric) != "none" and comparable(group, metric):
            found.append(_ranked(group, metric, columns, of_metric))
    return found


def _ranked(
    group: list[Entry], metric: str, columns: list[Variant], differences: list[Difference]
) -> Ranking:
    sign = -1 if direction(group, metric) == "lower" else 1
    there = [column for column in columns if column.mean(metric) is not None]
    clearly, judged = [], False
    for a in there:
        for b in there:
            if a is b:
                continue
            better = beyond_noise(a, b, metric, sign, differences)
            judged = judged or better is not None
            if better:
                clearly.append((a, b))
    best = None
    for column in there:
        beaten = [worse for better, worse in clearly if better is column]
        if len(there) > 1 and len(beaten) == len(there) - 1:
            best = column
    return Ranking(metric, best, clearly, judged)


def beyond_noise(
    a: Variant, b: Variant, metric: str, sign: int, differences: list[Difference]
) -> bool | None:
    """Whether `a` is better than `b` by more than the noise; None if the noise is not known.

    Over common seeds the paired test decides. Otherwise the difference must exceed the 95 % interval of a
    difference of two independent values, sqrt(h_a^2 + h_b^2) of the half widths.
    """
    for difference in differences:
        if {difference.a, difference.b} == {a.name, b.name}:
            return difference.better == a.name
    mine, theirs = a.half_width(metric), b.half_width(metric)
    value, other = a.mean(metric), b.mean(metric)
    if mine is None or theirs is None or value is None or other is None:
        return None
    return sign * (value - other) > (mine**2 + theirs**2) ** 0.5


def in_words(group: list[Entry], found: list[Ranking], labels: dict[str, str]) -> list[str]:
    """Say which differences exceed the noise, which do not, and which cannot be judged."""
    if len(variants(group)) < 2:
        return []
    lines, within, unknown = [], [], []
    for ranking in found:
        label = labels.get(ranking.metric, ranking.metric)
        if not ranking.judged:
            unknown.append(label)
        elif not ranking.clearly:
            within.append(label)
        else:
            lines.append(f"{label}: {_pairs(ranking)}")
    if within:
        lines.append(f"No difference beyond luck: {', '.join(within)}.")
    if unknown:
        lines.append(f"Not judged, because there is no interval: {', '.join(unknown)}.")
    lines.append(SEVERAL_SEEDS if several_seeds(group) else ONE_SEED)
    return lines


def _pairs(ranking: Ranking) -> str:
    """`a (21.5 ±0.5) is better than b (30 ±0.5)`, for every variant that is better than others."""
    beaten: dict[str, list[str]] = {}
    for better, worse in ranking.clearly:
        said = f"{better.name} ({better.text(ranking.metric)})"
        beaten.setdefault(said, []).append(f"{worse.name} ({worse.text(ranking.metric)})")
    parts = [f"{better} is better than {' and '.join(worse)}" for better, worse in beaten.items()]
    return "; ".join(parts) + "."

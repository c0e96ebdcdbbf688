"""Variants over seeds: means, deviations and significant differences."""

from __future__ import annotations

import statistics
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from pipeline.reporting.entries import (
    Entry,
    Rows,
    comparable,
    direction,
    group_by_protocol,
    headings,
    headline_names,
    read_entries,
)
from pipeline.reporting.page import heading, page, paragraph, right_aligned, section, table
from pipeline.reporting.text import digest_line, number, protocol_line, text_table, with_arrow
from pipeline.rundir import layout
from pipeline.rundir.files import write_text
from pipeline.rundir.record import variant

SIGNIFICANT = 0.05
SPREAD = "Mean ± standard deviation over seeds (n - 1 in its denominator); a single seed has none."
TESTED = (
    "Differences of variants over the seeds that both have, paired by seed (equal seeds see equal images"
    " in the same order): mean, 95 % interval and p of Student's t, corrected (Holm) for the pairs of"
    " variants in each metric. Few seeds reveal only large differences."
)


class Difference(NamedTuple):
    """Two variants in one metric, over the `n` seeds that both have."""

    metric: str
    direction: str  # lower | higher
    a: str
    b: str
    n: int
    mean: float  # of a - b
    low: float  # 95 % interval
    high: float
    p: float  # of "no difference", corrected by Holm

    @property
    def better(self) -> str:
        """The significantly better variant, or "–"."""
        if self.p >= SIGNIFICANT or self.low <= 0 <= self.high:
            return "–"
        a_is_lower = self.high < 0
        return self.a if a_is_lower == (self.direction == "lower") else self.b


def seed_table(run_dirs: list[Path], folder: Path) -> list[Path]:
    """Write table.md and table.html into `folder`, with one table for each protocol.

    Raises DataError for a run without an evaluation.
    """
    groups = group_by_protocol(read_entries(run_dirs))
    title = "Variants over seeds"
    markdown = "\n".join([f"# {title}", "", SPREAD, "", *(_markdown(group) for group in groups)])
    parts = [section(title, *seed_parts(group)) for group in groups]
    html = page(title, [heading(title, {"runs": len(run_dirs)}), *parts])
    files = [folder / "table.md", folder / "table.html"]
    write_text(files[0], markdown)
    write_text(files[1], html)
    return files


def seed_parts(group: list[Entry]) -> list[str]:
    """Return the tables of one protocol as HTML."""
    parts = [paragraph(_protocol(group)), paragraph(SPREAD, soft=True), _html(_variant_rows(group))]
    found = variant_differences(group)
    if found:
        parts += [paragraph(TESTED, soft=True), _html(_difference_rows(found))]
    return parts


def seed_text(group: list[Entry]) -> list[str]:
    """Return the tables of one protocol as text; nothing if no variant has several seeds."""
    if not several_seeds(group):
        return []
    parts = [SPREAD, text_table(*_variant_rows(group))]
    found = variant_differences(group)
    if found:
        parts += [TESTED, text_table(*_difference_rows(found))]
    return parts


def several_seeds(group: list[Entry]) -> bool:
    """Whether some variant of a group has more than one seed."""
    return any(len({entry.seed for entry in entries}) > 1 for entries in by_variant(group).values())


def by_variant(group: list[Entry]) -> dict[str, list[Entry]]:
    """Return the runs of each variant: one name, and one configuration of the training but for the seed.

    A run of another configuration with the same name stands alone, under its folder's name.
    """
    found: dict[str, list[Entry]] = {}
    trained: dict[str, Any] = {}
    for entry in group:
        config, name = entry.config, variant(entry.config)
        later = config.train.images, config.tune, config.refine, config.steer
        settings = {**layout.trained_sections(config), "seed": None}, later
        if trained.setdefault(name, settings) != settings:
            name = f"{name} ({entry.name})"
        found.setdefault(name, []).append(entry)
    return found


def variant_differences(group: list[Entry]) -> list[Difference]:
    """Compare pairs of variants with two common seeds, in every metric with a direction."""
    corrected = []
    for metric in headline_names(group):
        better = direction(group, metric)
        if better == "none" or not comparable(group, metric):
            continue
        found = []
        for (a, ours), (b, theirs) in combinations(by_variant(group).items(), 2):
            pairs = _paired(ours, theirs, metric)
            if len(pairs) > 1:
                numbers = paired_t(np.array(pairs))
                found.append(Difference(metric, better, a, b, len(pairs), *numbers))
        corrected += _holm(found)
    return corrected


def paired_t(pairs: np.ndarray) -> tuple[float, float, float, float]:
    """Student's t test of differences [n] with n - 1 degrees of freedom.

    Returns their mean, its 95 % interval, and the two-sided p of "the mean is 0".
    """
    n, mean = len(pairs), float(pairs.mean())
    error = float(pairs.std(ddof=1)) / n**0.5
    if error == 0:  # the very same difference every time
        return mean, mean, mean, float(mean == 0)
    half = float(stdtrit(n - 1, 0.975)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return mean, mean - half, mean + half, p


def _holm(found: list[Difference]) -> list[Difference]:
    """Correct p for the number of differences that were tested (Holm, 1979)."""
    order = sorted(range(len(found)), key=lambda i: found[i].p)
    largest, corrected = 0.0, list(found)
    for rank, i in enumerate(order):
        scaled = (len(found) - rank) * found[i].p
        largest = max(largest, min(1.0, scaled))
        corrected[i] = found[i]._replace(p=largest)
    return corrected


def _paired(ours: list[Entry], theirs: list[Entry], metric: str) -> list[float]:
    """Differences of a metric over the seeds that two variants share."""
    a, b = _by_seed(ours, metric), _by_seed(theirs, metric)
    return [a[seed] - b[seed] for seed in a if seed in b]


def _by_seed(entries: list[Entry], metric: str) -> dict[int, float]:
    values = {entry.seed: entry.evaluation.metrics.get(metric) for entry in entries}
    return {seed: value for seed, value in values.items() if value is not None}


def _variant_rows(group: list[Entry]) -> Rows:
    names = headline_names(group)
    rows = []
    for name, entries in by_variant(group).items():
        rows.append([name, str(len(entries)), *(_mean_and_deviation(entries, metric) for metric in names)])
    return ["variant", "seeds", *headings(group, names)], rows


def _difference_rows(found: list[Difference]) -> Rows:
    rows = []
    for d in found:
        rows.append(
            [
                with_arrow(d.metric, d.direction),
                f"{d.a} - {d.b}",
                str(d.n),
                number(d.mean),
                f"{number(d.low)} to {number(d.high)}",
                f"{d.p:.2g}",
                d.better,
            ]
        )
    head = ["metric", "difference", "seeds", "mean", "95 % interval", "p, corrected"]
    return [*head, f"better (p < {SIGNIFICANT:g})"], rows


def _mean_and_deviation(entries: list[Entry], metric: str) -> str:
    known = [entry.evaluation.metrics.get(metric) for entry in entries]
    values = [value for value in known if value is not None]
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return number(statistics.mean(values)) + deviation


def _protocol(group: list[Entry]) -> str:
    protocol = group[0].protocol
    return f"{protocol_line(protocol)}; {digest_line(protocol)}"


def _markdown(group: list[Entry]) -> str:
    parts = [_protocol(group), _markdown_table(_variant_rows(group))]
    found = variant_differences(group)
    if found:
        parts += [TESTED, _markdown_table(_difference_rows(found))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Rows) -> str:
    head, lines = rows
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *lines))


def _html(rows: Rows) -> str:
    head, lines = rows
    body = [("", [row[0], *right_aligned(row[1:])]) for row in lines]
    return table([head[0], *right_aligned(head[1:])], body)

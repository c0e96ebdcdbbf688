"""Variants over seeds: mean and standard deviation of each headline number, and which differences are more than luck."""

from __future__ import annotations

import statistics
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from pipeline.reporting.comparison import Entry, group_by_protocol, protocol_line, read_entries
from pipeline.reporting.headline import direction, metric_names, number
from pipeline.reporting.page import Cell, heading, page, paragraph, section, table
from pipeline.reporting.text import columns
from pipeline.rundir.files import write_text
from pipeline.rundir.record import run_config

Rows = tuple[list[str], list[list[str]]]
SPREAD = "Mean ± standard deviation over seeds (n - 1 in its denominator); a single seed has none."
TESTED = (
    "Differences of variants over the seeds that both have, paired by seed (equal seeds see the same images in the same order): mean,"
    " 95 % interval and p of Student's t, corrected (Holm) for the pairs of variants in each metric. Few seeds find only large differences."
)


class Difference(NamedTuple):
    """Two variants in one metric over `n` seeds of both: mean of a - b, its 95 % interval, p of "no difference", corrected by Holm."""

    metric: str
    a: str
    b: str
    n: int
    mean: float
    low: float
    high: float
    p: float


def seed_table(run_dirs: list[Path], folder: Path) -> list[Path]:
    """Write table.md and table.html into `folder`; a table for each protocol. Raises DataError for a run without an evaluation."""
    groups = group_by_protocol(read_entries(run_dirs))
    markdown = "\n".join(["# Variants over seeds", "", SPREAD, "", *(_markdown(group) for group in groups)])
    write_text(folder / "table.md", markdown)
    parts = [section("Variants over seeds", *seed_parts(group)) for group in groups]
    write_text(
        folder / "table.html",
        page("Variants over seeds", [heading("Variants over seeds", {"runs": len(run_dirs)}), *parts]),
    )
    return [folder / "table.md", folder / "table.html"]


def seed_parts(group: list[Entry]) -> list[str]:
    """The tables of one protocol as HTML."""
    parts = [
        paragraph(protocol_line(group[0]).replace("\n", "; ")),
        paragraph(SPREAD, soft=True),
        _html(_rows(group)),
    ]
    if found := differences(group):
        parts += [paragraph(TESTED, soft=True), _html(_difference_rows(found))]
    return parts


def seed_text(group: list[Entry]) -> list[str]:
    """The tables of one protocol as text; nothing where no variant has several seeds."""
    if not several_seeds(group):
        return []
    found = differences(group)
    return [SPREAD, columns(*_rows(group)), *([TESTED, columns(*_difference_rows(found))] if found else [])]


def several_seeds(group: list[Entry]) -> bool:
    """Whether a variant stands in a group with more than one seed."""
    return any(len(entries) > 1 for entries in _variants(group).values())


def variant(entry: Entry) -> str:
    """The run's name without the seed behind it, as a sweep puts it there."""
    return run_config(entry.run_dir).name.removesuffix(f"-s{entry.seed}")


def differences(group: list[Entry]) -> list[Difference]:
    """Every pair of variants with two or more seeds in common, in every metric that has a direction."""
    corrected = []
    for metric in filter(direction, metric_names([e.evaluation for e in group])):
        found = []
        for (a, ours), (b, theirs) in combinations(_variants(group).items(), 2):
            if len(pairs := _paired(ours, theirs, metric)) > 1:
                found.append(Difference(metric, a, b, len(pairs), *paired_t(np.array(pairs))))
        corrected += _holm(found)
    return corrected


def paired_t(differences: np.ndarray) -> tuple[float, float, float, float]:
    """Mean of differences [n], its 95 % interval, and the two-sided p of "the mean is 0" (Student's t, n - 1 degrees of freedom)."""
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / n**0.5
    if error == 0:  # the very same difference every time
        return mean, mean, mean, float(mean == 0)
    half = float(student.ppf(0.975, n - 1)) * error
    return mean, mean - half, mean + half, 2 * float(student.sf(abs(mean) / error, n - 1))


def _holm(found: list[Difference]) -> list[Difference]:
    """Adjust p for the number of differences that were tested (Holm, 1979)."""
    order, largest, corrected = sorted(range(len(found)), key=lambda i: found[i].p), 0.0, list(found)
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(found) - rank) * found[i].p))
        corrected[i] = found[i]._replace(p=largest)
    return corrected


def _paired(ours: list[Entry], theirs: list[Entry], metric: str) -> list[float]:
    values = [{e.seed: e.evaluation.metrics.get(metric) for e in entries} for entries in (ours, theirs)]
    common = [(a, values[1].get(seed)) for seed, a in values[0].items()]
    return [a - b for a, b in common if a is not None and b is not None]


def _variants(group: list[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in group:
        found.setdefault(variant(entry), []).append(entry)
    return found


def _rows(group: list[Entry]) -> Rows:
    names = metric_names([e.evaluation for e in group])
    rows = [
        [name, str(len(entries)), *(_cell(entries, metric) for metric in names)]
        for name, entries in _variants(group).items()
    ]
    return ["variant", "seeds", *(f"{name} {direction(name)}".strip() for name in names)], rows


def _difference_rows(found: list[Difference]) -> Rows:
    rows = []
    for d in found:
        better = {"↓": d.high < 0, "↑": d.low > 0}[direction(d.metric)]
        worse = {"↓": d.low > 0, "↑": d.high < 0}[direction(d.metric)]
        verdict = "–" if d.p >= 0.05 else d.a if better else d.b if worse else "–"
        interval = f"{number(d.low)} to {number(d.high)}"
        rows.append(
            [
                f"{d.metric} {direction(d.metric)}",
                f"{d.a} - {d.b}",
                str(d.n),
                number(d.mean),
                interval,
                f"{d.p:.2g}",
                verdict,
            ]
        )
    return [
        "metric",
        "difference",
        "seeds",
        "mean",
        "95 % interval",
        "p, corrected",
        "better (p < 0.05)",
    ], rows


def _cell(entries: list[Entry], metric: str) -> str:
    values = [e.evaluation.metrics[metric] for e in entries if e.evaluation.metrics.get(metric) is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return number(statistics.mean(values)) + spread


def _markdown(group: list[Entry]) -> str:
    tables = [_lines(_rows(group))]
    if found := differences(group):
        tables += [[TESTED], _lines(_difference_rows(found))]
    return (
        "\n\n".join([protocol_line(group[0]).replace("\n", "; "), *("\n".join(lines) for lines in tables)])
        + "\n"
    )


def _lines(rows: Rows) -> list[str]:
    head, lines = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines)]


def _html(rows: Rows) -> str:
    head, lines = rows
    body: list[tuple[str, list[Cell]]] = [("", [row[0], *((cell, "n") for cell in row[1:])]) for row in lines]
    return table([head[0], *((text, "n") for text in head[1:])], body)

"""Variants over seeds: mean and standard deviation of each headline number, as the paper's table."""

from __future__ import annotations

import statistics
from pathlib import Path

from pipeline.evaluation.comparison import Entry, group_by_protocol, metric_names, protocol_line, read_entries
from pipeline.evaluation.headline import direction, number
from pipeline.evaluation.page import Cell, heading, page, paragraph, section, table
from pipeline.runtime.files import write_text
from pipeline.runtime.record import run_config

Rows = tuple[list[str], list[list[str]]]


def seed_table(run_dirs: list[Path], folder: Path) -> list[Path]:
    """Write table.md and table.html into `folder`; a table for each protocol. Raises DataError for a run without an evaluation."""
    groups = [(group, _rows(group)) for group in group_by_protocol(read_entries(run_dirs))]
    explained = "Mean ± standard deviation over seeds (n - 1 in its denominator); a single seed has none."
    write_text(folder / "table.md", "\n".join(["# Variants over seeds", "", explained, "", *(_markdown(*part) for part in groups)]))
    parts = [section("Variants over seeds", paragraph(explained), *(_html(*part) for part in groups))]
    write_text(folder / "table.html", page("Variants over seeds", [heading("Variants over seeds", {"runs": len(run_dirs)}), *parts]))
    return [folder / "table.md", folder / "table.html"]


def variant(entry: Entry) -> str:
    """The run's name without the seed that a sweep put behind it."""
    return run_config(entry.run_dir).name.removesuffix(f"-s{entry.seed}")


def _rows(group: list[Entry]) -> Rows:
    names = metric_names(group)
    variants: dict[str, list[Entry]] = {}
    for entry in group:
        variants.setdefault(variant(entry), []).append(entry)
    rows = [[name, str(len(entries)), *(_cell(entries, metric) for metric in names)] for name, entries in variants.items()]
    return ["variant", "seeds", *(f"{name} {direction(name)}".strip() for name in names)], rows


def _cell(entries: list[Entry], metric: str) -> str:
    values = [e.evaluation.metrics[metric] for e in entries if e.evaluation.metrics.get(metric) is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return number(statistics.mean(values)) + spread


def _markdown(group: list[Entry], rows: Rows) -> str:
    head, lines = rows
    text = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines)]
    return "\n".join([protocol_line(group[0]).replace("\n", "; "), "", *text, ""])


def _html(group: list[Entry], rows: Rows) -> str:
    head, lines = rows
    body: list[tuple[str, list[Cell]]] = [("", [row[0], *((cell, "n") for cell in row[1:])]) for row in lines]
    return paragraph(protocol_line(group[0]).replace("\n", "; ")) + table([head[0], *((text, "n") for text in head[1:])], body)

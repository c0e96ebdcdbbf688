"""Variants side by side: only numbers of one protocol share a table."""

from __future__ import annotations

from pathlib import Path

from pipeline.reporting.comparison import (
    Entry,
    attribute_rows,
    differences,
    group_by_protocol,
    headline_rows,
    notes,
    protocol_line,
    read_entries,
)
from pipeline.reporting.page import (
    Cell,
    drawing,
    gallery,
    heading,
    page,
    paragraph,
    picture,
    section,
    subheading,
    table,
)
from pipeline.reporting.plots import RUN_COLOURS, panel, series
from pipeline.reporting.seeds import seed_parts, seed_text, several_seeds
from pipeline.reporting.text import columns
from pipeline.rundir import layout
from pipeline.rundir.files import write_text
from pipeline.rundir.metrics_log import read_metrics


def compare(run_dirs: list[Path], out: Path | None = None) -> str:
    """Tables of the newest complete evaluation of each run, as text of at most 120 columns; also as a page in `out`.

    Raises DataError that names a run without an evaluation, ConfigError for a folder that is no run directory.
    """
    entries = read_entries(run_dirs)
    groups = group_by_protocol(entries)
    warning = differences(groups)
    parts = [warning] if warning else []
    for group in groups:
        parts += [
            protocol_line(group[0]),
            columns(*headline_rows(group)),
            columns(*attribute_rows(group)),
            "\n".join(notes(group)),
            *seed_text(group),
        ]
    if out is not None:
        write_text(
            out,
            page(
                "Comparison", [heading("Comparison", {"runs": len(entries)}), *_page_parts(groups, warning)]
            ),
        )
    return "\n\n".join(part for part in parts if part)


def _page_parts(groups: list[list[Entry]], warning: str) -> list[str]:
    parts = [section("Protocols", *(paragraph(line) for line in warning.splitlines()))] if warning else []
    for group in groups:
        head, rows = headline_rows(group)
        parts.append(
            section(
                "Headline numbers",
                paragraph(protocol_line(group[0]).replace("\n", "; ")),
                _html_table(head, rows),
                *(paragraph(line, soft=True) for line in notes(group)),
            )
        )
        if several_seeds(group):
            parts.append(section("Variants over seeds", *seed_parts(group)))
        parts.append(section("Pictures", *_side_by_side(group)))
        parts.append(section("Attributes", _html_table(*attribute_rows(group))))
    everyone = [entry for group in groups for entry in group]
    return [*parts, section("Training", gallery(_curves(everyone)))]


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    def cell(text: str) -> Cell:
        return text.strip("* "), "n best" if text.endswith("*") else "n off" if text == "not read" else "n"

    lines = [
        ("reference" if row[0] in ("floor", "ceiling") else "", [row[0], *map(cell, row[1:])]) for row in rows
    ]
    return table([head[0], *((text, "n") for text in head[1:])], lines)


def _side_by_side(group: list[Entry]) -> list[str]:
    """Pictures of equal names: the same requests and the same noise in every variant."""
    names = dict.fromkeys(file.name for e in group for file in e.evaluation.pictures)
    parts = []
    for name in names:
        shown = [
            picture(file, e.name) for e in group if (file := e.evaluation.folder / "samples" / name).exists()
        ]
        parts += [subheading(Path(name).stem.replace("_", " ")), gallery(shown)]
    return parts


def _curves(entries: list[Entry]) -> list[str]:
    """Validation curves of all runs in one drawing for each quantity; they depend on no evaluation."""
    read = [(e, read_metrics(layout.train_dir(e.run_dir) / "metrics.jsonl")) for e in entries]
    figures = []
    for name, caption in (
        ("bits_per_dim", "bits per dimension"),
        ("kl", "KL, nats"),
        ("sigma", "σ*"),
        ("active_units", "active units"),
    ):
        lines = [
            series(records, f"val_ema/{name}", e.name, RUN_COLOURS[i % len(RUN_COLOURS)])
            for i, (e, records) in enumerate(read)
        ]
        if lines := [line for line in lines if len(line.steps)]:
            figures.append(drawing(panel(caption, lines), f"{caption}; validation, averaged weights"))
    return figures

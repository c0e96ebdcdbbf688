"""Variants side by side, as text and as comparison.html.

Only numbers of one protocol share a table.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.reporting.entries import (
    Entry,
    Rows,
    attribute_rows,
    group_by_protocol,
    headline_rows,
    notes,
    protocol_warning,
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
    right_aligned,
    section,
    subheading,
    table,
)
from pipeline.reporting.plots import RUN_COLOURS, panel, series
from pipeline.reporting.seeds import seed_parts, seed_text, several_seeds
from pipeline.reporting.text import digest_line, protocol_line, text_table
from pipeline.rundir import layout
from pipeline.rundir.files import write_text
from pipeline.rundir.metrics_log import read_metrics

CURVES = {
    "bits_per_dim": "bits per dimension",
    "kl": "KL, nats",
    "sigma": "σ*",
    "active_units": "active units",
}


def compare(run_dirs: list[Path], out: Path | None = None) -> str:
    """Compare the newest complete evaluation of each run, as text and as a page in `out`.

    Raises DataError that names a run without an evaluation, and ConfigError for a folder that is no
    run directory.
    """
    entries = read_entries(run_dirs)
    groups = group_by_protocol(entries)
    warning = protocol_warning(groups)
    parts = [warning]
    for group in groups:
        protocol = group[0].protocol
        parts += [
            protocol_line(protocol) + "\n" + digest_line(protocol),
            text_table(*headline_rows(group)),
            text_table(*attribute_rows(group)),
            "\n".join(notes(group)),
            *seed_text(group),
        ]
    if out is not None:
        title = heading("Comparison", {"runs": len(entries)})
        write_text(out, page("Comparison", [title, *_page_parts(groups, warning)]))
    return "\n\n".join(part for part in parts if part)


def _page_parts(groups: list[list[Entry]], warning: str) -> list[str]:
    parts = [section("Protocols", *(paragraph(line) for line in warning.splitlines()))]
    for group in groups:
        protocol = group[0].protocol
        parts.append(
            section(
                "Headline numbers",
                paragraph(f"{protocol_line(protocol)}; {digest_line(protocol)}"),
                _html_table(headline_rows(group)),
                *(paragraph(line, soft=True) for line in notes(group)),
            )
        )
        if several_seeds(group):
            parts.append(section("Variants over seeds", *seed_parts(group)))
        parts.append(section("Pictures", *_side_by_side(group)))
        parts.append(section("Attributes", _html_table(attribute_rows(group))))
    everyone = [entry for group in groups for entry in group]
    return [*parts, section("Training", gallery(_curves(everyone)))]


def _html_table(rows: Rows) -> str:
    head, lines = rows
    body: list[tuple[str, list[Cell]]] = []
    for line in lines:
        css = "reference" if line[0] in ("floor", "ceiling") else ""
        cells: list[Cell] = [line[0]]
        for text in line[1:]:
            cells.append((text.strip("* "), "n best" if text.endswith("*") else "n"))
        body.append((css, cells))
    return table([head[0], *right_aligned(head[1:])], body)


def _side_by_side(group: list[Entry]) -> list[str]:
    """Pictures of equal names: the same requests and the same noise in every variant."""
    names = dict.fromkeys(file.name for entry in group for file in entry.evaluation.pictures)
    parts = []
    for name in names:
        shown = []
        for entry in group:
            file = entry.evaluation.folder / "samples" / name
            if file.exists():
                shown.append(picture(file, entry.name))
        parts += [subheading(Path(name).stem.replace("_", " ")), gallery(shown)]
    return parts


def _curves(entries: list[Entry]) -> list[str]:
    """Validation curves of all runs, one drawing for each quantity.

    They depend on no evaluation.
    """
    logs = [read_metrics(layout.train_dir(entry.run_dir) / "metrics.jsonl") for entry in entries]
    figures = []
    for name, caption in CURVES.items():
        lines = []
        for i, (entry, records) in enumerate(zip(entries, logs, strict=True)):
            colour = RUN_COLOURS[i % len(RUN_COLOURS)]
            line = series(records, f"val_ema/{name}", entry.name, colour)
            if len(line.steps):
                lines.append(line)
        if lines:
            figures.append(drawing(panel(caption, lines), f"{caption}; validation, averaged weights"))
    return figures

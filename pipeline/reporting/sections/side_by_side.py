"""The parts of a comparison's page: words, tables, pictures of the same noise, curves."""

from __future__ import annotations

from pipeline.reporting.entries import Entry, Rows, attribute_rows, notes
from pipeline.reporting.faces import Sheet, sheets
from pipeline.reporting.page import (
    Cell,
    TableRows,
    bullets,
    drawing,
    faces,
    folded,
    gallery,
    paragraph,
    picture,
    right_aligned,
    section,
    subheading,
    table,
)
from pipeline.reporting.plots import RUN_COLOURS, panel, series
from pipeline.reporting.seeds import seed_parts, several_seeds
from pipeline.reporting.text import digest_line, protocol_line
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics

CURVES = {
    "bits_per_dim": "bits per dimension",
    "kl": "KL, nats",
    "sigma": "σ*",
    "active_units": "active units",
}
SHOWN = {"samples": 2, "one_attribute": 1, "attribute_flip": 1, "rare": 1}  # rows; the others are folded
FOLDED_ROWS = 1
MOST_RUNS = 8  # whose pictures are shown


def parts(
    group: list[Entry],
    words: list[str],
    headline: Rows,
    others: Rows,
    references: list[list[str]],
    keys: Rows,
) -> list[str]:
    """Return the sections of one protocol. `references` names the two references of each metric."""
    protocol = group[0].protocol
    facts = len(headline[1]) + len(others[1]) - len(references)
    top = [["", ""]] * facts + references[: len(headline[1]) - facts]
    rest = references[len(headline[1]) - facts :]
    told = [
        section(
            "Which is better?",
            bullets(words),
            metrics(headline, top),
            *(paragraph(line, soft=True) for line in notes(group, mark="blue:")),
            paragraph(f"{protocol_line(protocol)}; {digest_line(protocol)}", soft=True),
        ),
        section("What differs", plain(keys)),
        section("The same noise", *_pictures(group)),
        section(
            "Details",
            folded("All numbers", metrics(others, rest)),
            folded("Attributes", plain(attribute_rows(group))),
            folded("Runs over seeds", *(seed_parts(group) if several_seeds(group) else [])),
        ),
    ]
    return told


def metrics(rows: Rows, references: list[list[str]]) -> str:
    """A table of metrics: the best value is marked, and each reference says whose it is."""
    head, lines = rows
    body: TableRows = []
    for line, names in zip(lines, references, strict=True):
        cells: list[Cell] = [line[0]]
        for text in line[1:-2]:
            cells.append((text.strip("* "), "n best" if text.endswith("*") else "n"))
        for text, name in zip(line[-2:], names, strict=True):
            small = f"\n{name}" if name and text not in ("", "–") else ""
            cells.append((text + small, "n reference"))
        body.append(("", cells))
    return table([head[0], *right_aligned(head[1:])], body) if body else ""


def plain(rows: Rows) -> str:
    """A table without marks."""
    head, lines = rows
    body: TableRows = [("", [line[0], *right_aligned(line[1:])]) for line in lines]
    return table([head[0], *right_aligned(head[1:])], body) if body else ""


def _pictures(group: list[Entry]) -> list[str]:
    """Rows of equal requests and equal noise, one below the other for all runs."""
    shown = group[:MOST_RUNS]
    found = [{sheet.name: sheet for sheet in sheets(entry.evaluation.folder / "samples")} for entry in shown]
    open_parts: list[str] = []
    folded_parts: list[str] = []
    for name in dict.fromkeys(name for one in found for name in one):
        pairs = [(entry, one[name]) for entry, one in zip(shown, found, strict=True) if name in one]
        rows = SHOWN.get(name, FOLDED_ROWS)
        part = _rows_of(pairs, rows)
        (open_parts if name in SHOWN else folded_parts).extend(part)
    if not open_parts:  # old evaluations, which do not say what their pictures show
        return _whole(shown)
    return [*open_parts, folded("More pictures", *folded_parts)]


def _rows_of(pairs: list[tuple[Entry, Sheet]], rows: int) -> list[str]:
    sheet = pairs[0][1]
    parts = [subheading(sheet.title), paragraph(sheet.caption, soft=True)]
    cut = [(entry, list(one.rows(0, rows))) for entry, one in pairs]
    for k in range(rows):
        for entry, strips in cut:
            if k < len(strips):
                label = f"{entry.name}: {strips[k].label}" if strips[k].label else entry.name
                parts.append(faces(strips[k].under(label), sheet.title))
    return parts


def _whole(group: list[Entry]) -> list[str]:
    names = dict.fromkeys(file.name for entry in group for file in entry.evaluation.pictures)
    parts = []
    for name in names:
        files = [(entry, entry.evaluation.folder / "samples" / name) for entry in group]
        there = [picture(file, entry.name) for entry, file in files if file.exists()]
        parts += [subheading(name.removesuffix(".png").replace("_", " ")), gallery(there)]
    return parts


def curves(entries: list[Entry]) -> str:
    """Validation curves of all runs, one drawing for each quantity; they depend on no evaluation."""
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
    return section("Training", gallery(figures))

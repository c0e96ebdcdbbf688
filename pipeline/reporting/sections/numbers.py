"""The numbers of an evaluation: the six with bars, the verdicts, and folded tables of all of them."""

from __future__ import annotations

from typing import Any

from pipeline.reporting.page import (
    Cell,
    TableRows,
    bar,
    card,
    cards,
    folded,
    paragraph,
    right_aligned,
    section,
    statement,
    statements,
    table,
)
from pipeline.reporting.sections.verdicts import Reading, readings, verdicts
from pipeline.reporting.text import interval_text, number, protocol_line, with_arrow, with_half_width
from pipeline.rundir.headline import HEADLINES, standing_for
from pipeline.rundir.record import Evaluation

LEGEND = (
    "A bar goes from one reference, at its left, to a better one, at its right; the thin line is the 95 %"
    " interval. A reference is no limit: samples can be sharper than it or show attributes more clearly."
)
NUMBERS = "↓ lower is better, ↑ higher is better. N: images or samples measured."
RARE_COLUMNS = {
    "annotated_count": "in annotations",
    "train_count": "in training",
    "held_out_count": "held out",
    "success": "success",
    "interval": "95 % interval",
    "real_success": "real images",
    "n": "N",
}
ATTRIBUTE_COLUMNS = {
    "accuracy": "samples",
    "real_accuracy": "real images",
    "shuffled_accuracy": "shuffled requests",
    "balanced_accuracy": "samples, balanced",
    "real_balanced_accuracy": "real, balanced",
}


def verdict(evaluation: Evaluation, records: list[dict[str, Any]], others: list[Evaluation]) -> str:
    """Return the answers and the six numbers with bars."""
    answers = []
    for found in verdicts(evaluation, records):
        answers.append(statement(found.question, found.answer, found.text, found.mood))
    said = f"Evaluation {evaluation.number}: {protocol_line(evaluation.protocol)}."
    left_out = evaluation.protocol.get("left_out")
    if left_out:
        said += f" It left out {left_out.replace(',', ', ')}."
        whole = [other.number for other in others if other.complete]
        if whole:
            said += f" Evaluation {whole[-1]} is complete: the table of evaluations shows its numbers."
    return section(
        "Verdict",
        statements(answers),
        cards(_card(evaluation, reading) for reading in readings(evaluation)),
        paragraph(f"{said} {LEGEND}", soft=True),
    )


def _card(evaluation: Evaluation, reading: Reading) -> str:
    about = evaluation.about.get(reading.metric, {})
    name = with_arrow(reading.label, about.get("direction", "none"))
    value = with_half_width(reading.value, reading.interval)
    track = ""
    if reading.reached is not None:
        ends = None
        if reading.interval:
            low, high = (reading.share(end) for end in reading.interval)
            ends = (low or 0.0, high or 0.0)
        left = f"{reading.floor_name}: {number(reading.floor)}"
        right = f"{reading.ceiling_name}: {number(reading.ceiling)}"
        track = bar(reading.reached, ends, left, right)
    return card(name, value, track, reading.metric)


def every_number(evaluation: Evaluation) -> str:
    """Return the folded table of all numbers, with their references."""
    numbers = right_aligned(["value", "95 % interval", "bad reference", "good reference", "N"])
    head: list[Cell] = ["metric", *numbers, "unit"]
    rows: TableRows = []
    for name in evaluation.headline_names:
        about = evaluation.about.get(name, {})
        title = with_arrow(name, about.get("direction", "none"))
        meaning = about.get("meaning", "")
        cells: list[Cell] = [
            (number(evaluation.metrics[name]), "n"),
            (interval_text(evaluation.intervals.get(name)), "n"),
            (_reference(evaluation.floors.get(name), about.get("floor_name", "")), "n"),
            (_reference(evaluation.ceilings.get(name), about.get("ceiling_name", "")), "n"),
            (number(about.get("n")), "n"),
        ]
        unit: Cell = (about.get("unit", ""), "soft")
        rows.append(("", [f"{title}\n{meaning}".rstrip(), *cells, unit]))
    return folded("All numbers", paragraph(NUMBERS, soft=True), table(head, rows))


def _reference(value: float | None, name: str) -> str:
    """A reference and, below it, whose value it is."""
    return "–" if value is None else f"{number(value)}\n{name}".rstrip()


def evaluations(found: list[Evaluation]) -> str:
    """Return the folded table of all evaluations of the run, if there are several."""
    if len(found) < 2:
        return ""
    head = right_aligned(["split", "N", "step", *(headline.label for headline in HEADLINES)])
    rows: TableRows = []
    for evaluation in found:
        protocol = evaluation.protocol
        cells = [str(protocol.get("split", "–")), number(protocol.get("n")), str(protocol.get("step", "–"))]
        for headline in HEADLINES:
            name = standing_for(headline, [evaluation])
            cells.append(with_half_width(evaluation.metrics.get(name), evaluation.intervals.get(name)))
        rows.append(("", [f"eval/{evaluation.number}", *right_aligned(cells)]))
    return folded("All evaluations of this run", table(["evaluation", *head], rows))


def rare(evaluation: Evaluation) -> str:
    """Return the folded table of rare combinations."""
    rows: TableRows = []
    for row in evaluation.rare:
        cells = [number(row.get(column)) for column in RARE_COLUMNS if column != "interval"]
        interval = f"{number(row.get('low'))} – {number(row.get('high'))}"
        cells.insert(list(RARE_COLUMNS).index("interval"), interval)
        rows.append(("", [" + ".join(row["attributes"]), *right_aligned(cells)]))
    text = (
        "How often the classifier finds all attributes of a rare combination in a sample that asked for it."
    )
    head: list[Cell] = ["asked for", *right_aligned(RARE_COLUMNS.values())]
    return folded("Rare combinations", paragraph(text), table(head, rows)) if rows else ""


def attributes(evaluation: Evaluation) -> str:
    """Return the folded table of attributes."""
    rows: TableRows = []
    for name, row in evaluation.per_attribute.items():
        read = row.get("read_by_model", True)
        title = name if read else f"{name} (not read by the model)"
        cells = [number(row.get(column)) for column in ATTRIBUTE_COLUMNS]
        rows.append(("" if read else "off", [title, *right_aligned(cells)]))
    text = "How often the classifier's decision on a sample is what was asked for."
    head: list[Cell] = ["attribute", *right_aligned(ATTRIBUTE_COLUMNS.values())]
    return folded("Attributes", paragraph(text), table(head, rows)) if rows else ""

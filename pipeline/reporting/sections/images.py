"""The pictures of a run: chosen rows at a size that can be judged, the rest folded."""

from __future__ import annotations

from pathlib import Path

from pipeline.reporting.faces import SHOWN_SIDE, Sheet, sheets
from pipeline.reporting.page import faces, folded, gallery, paragraph, picture, section, subheading
from pipeline.reporting.text import percent
from pipeline.rundir import layout
from pipeline.rundir.record import Evaluation
from pipeline.runtime.split import spread

CHOSEN = {"samples": 3, "one_attribute": 2, "attribute_flip": 3, "rare": 2, "reconstructions": 1}  # rows
ROWS_OF_LARGE = 4  # of a folded picture whose faces fill the screen as they are: a page stays small
GROWTH = 4  # pictures of samples over training


def chosen(evaluation: Evaluation) -> str:
    """Return the samples and a few rows of the other pictures."""
    parts = []
    for sheet in sheets(evaluation.folder / "samples"):
        if sheet.name in CHOSEN:
            parts += [*_heading(sheet), *_rows(sheet, evaluation, 0, CHOSEN[sheet.name])]
    if not parts:  # an old evaluation, which does not say what its pictures show
        parts = [gallery(picture(file) for file in evaluation.pictures)]
    return section("Pictures", *parts)


def more(evaluation: Evaluation) -> str:
    """Return everything that `chosen` leaves out, folded."""
    parts = []
    for sheet in sheets(evaluation.folder / "samples"):
        first = CHOSEN.get(sheet.name, 0)
        side = sheet.contents["side"]
        last = first + ROWS_OF_LARGE if side >= SHOWN_SIDE else sheet.rows_there
        shown = _rows(sheet, evaluation, first, last)
        if shown:
            parts += [*_heading(sheet), *shown]
        if last < sheet.rows_there:
            parts.append(paragraph(f"The other rows: {sheet.file}", soft=True))
    return folded("More pictures", *parts)


def growth(run_dir: Path) -> str:
    """Return samples of the same noise and requests at some validations, the last one included."""
    drawn = layout.progress_pictures(run_dir)
    if not drawn:
        return ""
    some = [drawn[i] for i in spread(min(GROWTH, len(drawn)), len(drawn))]
    some[-1] = drawn[-1]
    text = "The same noise and the same requested attributes, drawn with the averaged weights."
    return folded(
        "Samples over training",
        paragraph(text),
        gallery(picture(file, f"step {step:,}") for step, file in some),
    )


def _heading(sheet: Sheet) -> list[str]:
    return [subheading(sheet.title), paragraph(sheet.caption, soft=True)]


def _rows(sheet: Sheet, evaluation: Evaluation, first: int, last: int) -> list[str]:
    toggled = {row["attribute"]: row for row in evaluation.attribute_flips}
    parts = []
    for row in sheet.rows(first, last):
        note = ""
        if sheet.name == "attribute_flip" and row.label in toggled:
            found = toggled[row.label]
            note = f"takes effect in {percent(found['success'])} of {found['n']} samples"
            note += f" and changes {percent(found['side_effects'])} of the other decisions"
        parts.append(faces(row, sheet.title, note))
    return parts

"""Variants side by side, as text and as a page: metrics are rows, variants are columns.

Only numbers of one protocol share a table.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from pipeline.config.load import flatten
from pipeline.reporting.entries import (
    Entry,
    Rows,
    about,
    attribute_rows,
    direction,
    group_by_protocol,
    headline_names,
    notes,
    protocol_warning,
    read_entries,
)
from pipeline.reporting.page import heading, page, paragraph, section
from pipeline.reporting.sections import side_by_side
from pipeline.reporting.seeds import seed_text
from pipeline.reporting.text import (
    WIDTH,
    digest_line,
    duration,
    number,
    protocol_line,
    text_table,
    with_arrow,
)
from pipeline.reporting.variants import Variant, in_words, rankings, variants
from pipeline.rundir.files import write_text
from pipeline.rundir.headline import HEADLINES, standing_for

NOT_TOLD = ("name", "cluster.", "tracking.", "runs_dir")  # keys that say nothing about a variant


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
        parts += _text(group)
    if out is not None:
        title = heading("Comparison", {"runs": len(entries)})
        write_text(out, page("Comparison", [title, *_page_parts(groups, warning)]))
    return "\n\n".join(part for part in parts if part)


def _text(group: list[Entry]) -> list[str]:
    protocol = group[0].protocol
    labels = headline_labels(group)
    others = [name for name in headline_names(group) if name not in labels]
    return [
        protocol_line(protocol) + "\n" + digest_line(protocol),
        text_table(*metric_rows(group, list(labels), labels, facts=True)),
        "\n".join(fill(line, WIDTH) for line in in_words(group, rankings(group, list(labels)), labels)),
        text_table(*metric_rows(group, others, {})),
        text_table(*attribute_rows(group)),
        "\n".join(fill(line, WIDTH) for line in notes(group)),
        *seed_text(group),
    ]


def headline_labels(group: list[Entry]) -> dict[str, str]:
    """The metrics that stand for the headline in all runs of a group, with their labels."""
    labels = {}
    for headline in HEADLINES:
        name = standing_for(headline, [entry.evaluation for entry in group])
        if name:
            labels[name] = headline.label
    return labels


def metric_rows(group: list[Entry], names: list[str], labels: dict[str, str], facts: bool = False) -> Rows:
    """One row for each metric: its value in each variant, then a bad and a good reference."""
    columns = variants(group)
    best = {ranking.metric: ranking.best for ranking in rankings(group, names)}
    rows = _facts(columns) if facts else []
    for name in names:
        title = with_arrow(labels.get(name, name), direction(group, name))
        cells = [column.text(name) + _star(column, best.get(name)) for column in columns]
        rows.append([title, *cells, *references(group, name)])
    if not rows:
        return [], []
    return ["metric", *(column.name for column in columns), "bad reference", "good reference"], rows


def _facts(columns: list[Variant]) -> list[list[str]]:
    """Seeds, images seen by each phase and time of training."""
    seeds, seen, took = [], [], []
    for column in columns:
        seeds.append(" ".join(str(entry.seed) for entry in column.entries))
        images = {" + ".join(number(n) for n in entry.images) for entry in column.entries}
        seen.append(" ".join(sorted(images)))
        known = [entry.seconds for entry in column.entries if entry.seconds is not None]
        took.append(duration(sum(known) / len(known) if known else None))
    return [
        ["seed", *seeds, "", ""],
        ["images seen", *seen, "", ""],
        ["training", *took, "", ""],
    ]


def _star(column: Variant, best: Variant | None) -> str:
    """A star for the variant that is better than every other one beyond the noise."""
    if best is None:
        return ""
    return "*" if column is best or column.name == best.name else " "


def references(group: list[Entry], name: str) -> list[str]:
    """The bad and the good reference of a metric: one number each, or a range if it depends on the run."""
    return [_bound(group, "floors", name), _bound(group, "ceilings", name)]


def _bound(group: list[Entry], kind: str, name: str) -> str:
    bounds = [getattr(entry.evaluation, kind).get(name) for entry in group]
    known = [bound for bound in bounds if bound is not None]
    if not known:
        return "–"
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low}…{high}"


def reference_names(group: list[Entry], name: str) -> list[str]:
    """Whose values the bad and the good reference of a metric are."""
    described = about(group, name)
    return [str(described.get("floor_name", "")), str(described.get("ceiling_name", ""))]


def differing_keys(group: list[Entry]) -> Rows:
    """Configuration keys in which the variants of a group differ, as rows."""
    columns = variants(group)
    settings: list[dict[str, Any]] = [flatten(column.entries[0].config) for column in columns]
    rows = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = [str(one.get(key, "–")) for one in settings]
        if len(set(values)) > 1 and not key.startswith(NOT_TOLD):
            rows.append([key, *values])
    return ["key", *(column.name for column in columns)], rows


def _page_parts(groups: list[list[Entry]], warning: str) -> list[str]:
    parts = [section("Protocols", *(paragraph(line) for line in warning.splitlines()))]
    for group in groups:
        labels = headline_labels(group)
        others = [name for name in headline_names(group) if name not in labels]
        named = {name: reference_names(group, name) for name in [*labels, *others]}
        parts += side_by_side.parts(
            group,
            words=in_words(group, rankings(group, list(labels)), labels),
            headline=metric_rows(group, list(labels), labels, facts=True),
            others=metric_rows(group, others, {}),
            references=list(named.values()),
            keys=differing_keys(group),
        )
    everyone = [entry for group in groups for entry in group]
    return [*parts, side_by_side.curves(everyone)]

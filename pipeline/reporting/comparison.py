"""What a comparison consists of: runs grouped by the protocol of their newest evaluation, and the rows of their tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.reporting.headline import direction, duration, metric_names, number
from pipeline.rundir import layout, record
from pipeline.rundir.record import Evaluation

SHOWN = 28  # characters of a run's name


@dataclass(frozen=True)
class Entry:
    """One run in a comparison, with its newest complete evaluation."""

    run_dir: Path
    name: str
    seed: int
    seconds: float | None  # of training
    evaluation: Evaluation

    @property
    def protocol(self) -> dict[str, Any]:
        """What must be equal for two runs' numbers to share a table."""
        return self.evaluation.comparable

    @property
    def read(self) -> frozenset[str]:
        """Attributes that the model reads."""
        return frozenset(
            name for name, row in self.evaluation.per_attribute.items() if row.get("read_by_model", True)
        )


def read_entries(run_dirs: list[Path]) -> list[Entry]:
    """Each run with its newest complete evaluation (else its newest partial one); raises DataError that names a run without one."""
    names = [run_dir.absolute().name for run_dir in run_dirs]
    entries = []
    for run_dir, name in zip(run_dirs, names, strict=True):
        config = record.run_config(run_dir)
        found = record.headline(record.evaluations(run_dir))
        if found is None:
            raise DataError(
                f"{run_dir}: no complete evaluation in it; `python launch.py --run-dir {run_dir} --stages eval` makes one"
            )
        done = record.read_json(layout.train_dir(run_dir) / "done.json") or {}
        shown = name if names.count(name) == 1 else f"{run_dir.absolute().parent.name}/{name}"
        entries.append(Entry(run_dir, shown[-SHOWN:], config.seed, done.get("seconds"), found))
    return entries


def group_by_protocol(entries: list[Entry]) -> list[list[Entry]]:
    """Runs of equal protocols, in the order of their first run."""
    groups: list[list[Entry]] = []
    for entry in entries:
        group = next((g for g in groups if g[0].protocol == entry.protocol), None)
        if group is None:
            groups.append(group := [])
        group.append(entry)
    return groups


def differences(groups: list[list[Entry]]) -> str:
    """In what the protocols of several groups differ, "" for a single one."""
    if len(groups) == 1:
        return ""
    protocols = [group[0].protocol for group in groups]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    differing = {key: [_short(protocol.get(key, "–")) for protocol in protocols] for key in keys}
    lines = [
        f"  {key}: {' | '.join(values)}"
        for key, values in differing.items()
        if len({str(p.get(key)) for p in protocols}) > 1
    ]
    return "\n".join(
        [f"{len(groups)} protocols: numbers of different tables cannot be compared. They differ in", *lines]
    )


def _short(value: Any) -> str:
    return str(value)[:16]


def protocol_line(entry: Entry) -> str:
    """What the numbers of a table have in common."""
    p = entry.protocol
    split, n, size, crop, weights = (p.get(key, "?") for key in ("split", "n", "size", "crop", "weights"))
    text = f"{split} split, N = {n}, {size} px (crop {crop}), {weights} weights"
    digests = [
        f"{key.removesuffix('_digest')} {str(value)[:8]}"
        for key, value in p.items()
        if key.endswith("_digest")
    ]
    return text + "\n" + ", ".join(digests)


def _of_what_is_read(name: str) -> bool:
    return name.endswith("_read") or name.startswith("rare_")


def _value(entry: Entry, name: str) -> str:
    """The value and half the width of its 95 % interval."""
    evaluation = entry.evaluation
    text = number(evaluation.metrics.get(name))
    if name in evaluation.intervals:
        low, high = evaluation.intervals[name]
        text += f" ±{(high - low) / 2:.2g}"
    return text


def _best(group: list[Entry], name: str) -> list[Entry]:
    """The entries with the best value, where values differ and may be compared."""
    if not direction(name) or (_of_what_is_read(name) and len({e.read for e in group}) > 1):
        return []
    values = [e.evaluation.metrics[name] for e in group if name in e.evaluation.metrics]
    if len(set(values)) < 2:
        return []
    best = min(values) if direction(name) == "↓" else max(values)
    return [e for e in group if e.evaluation.metrics.get(name) == best]


def _star(entry: Entry, best: list[Entry]) -> str:
    return "*" if entry in best else " " if best else ""


def _reference(group: list[Entry], kind: str, name: str) -> str:
    """The floor or ceiling of a metric: one number, or its range where it depends on the run."""
    values = [bounds[name] for e in group if name in (bounds := getattr(e.evaluation, kind))]
    texts = list(dict.fromkeys(number(v) for v in (min(values), max(values)))) if values else ["–"]
    return "…".join(texts)


def headline_rows(group: list[Entry]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one row for each run, then floors and ceilings."""
    names = metric_names([e.evaluation for e in group])
    best = {name: _best(group, name) for name in names}
    head = [
        "run",
        "seed",
        "images seen",
        "training",
        *(f"{name} {direction(name)}".strip() for name in names),
    ]
    rows = []
    for e in group:
        facts = [e.name, str(e.seed), number(e.evaluation.protocol.get("images")), duration(e.seconds)]
        rows.append([*facts, *(_value(e, name) + _star(e, best[name]) for name in names)])
    for kind in ("floors", "ceilings"):
        rows.append([kind.removesuffix("s"), "", "", "", *(_reference(group, kind, name) for name in names)])
    return head, rows


def attribute_rows(group: list[Entry]) -> tuple[list[str], list[list[str]]]:
    """Accuracy of each attribute; marked where the model does not read it."""
    names = dict.fromkeys(name for e in group for name in e.evaluation.per_attribute)
    rows = []
    for name in names:
        table = [(e.evaluation.per_attribute.get(name, {}), name in e.read) for e in group]
        real = next(
            (number(row["real_accuracy"]) for row, _ in table if row.get("real_accuracy") is not None), "–"
        )
        rows.append(
            [
                name,
                *(number(row.get("accuracy")) + ("" if read else " (not read)") for row, read in table),
                real,
            ]
        )
    return ["attribute accuracy", *(e.name for e in group), "real images"], rows


def notes(group: list[Entry]) -> list[str]:
    """How a table is to be read, line by line."""
    lines = ["↓ lower is better, ↑ higher is better, * best value; ± half of the 95 % interval."]
    if len({e.read for e in group}) > 1:
        counts = ", ".join(f"{e.name} {len(e.read)}" for e in group)
        lines.append(
            f"attribute_*: over all attributes; *_read and rare_*: over those that a model reads ({counts}), so not comparable here."
        )
    return lines

"""Runs in a comparison: their evaluations, grouped by protocol, and the rows of the tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.errors import DataError
from pipeline.reporting.text import number, with_arrow
from pipeline.rundir import record
from pipeline.rundir.record import Evaluation

SHOWN = 28  # characters of a run's name
Rows = tuple[list[str], list[list[str]]]  # head and rows of a table


@dataclass(frozen=True)
class Entry:
    """One run in a comparison, with its newest complete evaluation."""

    run_dir: Path
    name: str
    seed: int
    images: list[int]  # seen by each phase up to the evaluated checkpoint
    seconds: float | None  # duration of these phases
    evaluation: Evaluation
    config: RunConfig

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings that must be equal before two runs share a table."""
        return self.evaluation.comparable

    @property
    def read(self) -> frozenset[str]:
        """Attributes that the model reads."""
        return self.evaluation.read


def read_entries(run_dirs: list[Path]) -> list[Entry]:
    """Read each run's newest complete evaluation, or its newest partial one if none is complete.

    A path may also be the folder of one evaluation, RUN_DIR/eval/2. Raises DataError that names what is
    not there.
    """
    pairs = [split_evaluation(path) for path in run_dirs]
    names = [named(run_dir, chosen) for run_dir, chosen in pairs]
    entries = []
    short = [name[-SHOWN:] for name in names]
    for (run_dir, chosen), name in zip(pairs, names, strict=True):
        config = record.run_config(run_dir)
        evaluation = chosen_evaluation(run_dir, chosen)
        images, seconds = record.effort(run_dir, evaluation)
        if names.count(name) > 1:
            name = f"{run_dir.absolute().parent.name}/{name}"
        shown = name if short.count(name[-SHOWN:]) > 1 else name[-SHOWN:]
        entries.append(Entry(run_dir, shown, config.seed, images, seconds, evaluation, config))
    return entries


def split_evaluation(path: Path) -> tuple[Path, int | None]:
    """Return the run directory, and the number of the evaluation if RUN_DIR/eval/<number> was given."""
    folder = path.absolute()
    if folder.parent.name == "eval" and folder.name.isdigit():
        return path.parent.parent, int(folder.name)
    return path, None


def named(run_dir: Path, chosen: int | None) -> str:
    """The name of a run, or of one of its evaluations, in tables."""
    name = run_dir.absolute().name
    return name if chosen is None else f"{name}/eval/{chosen}"


def chosen_evaluation(run_dir: Path, chosen: int | None) -> Evaluation:
    """Return the evaluation of that number, or the headline one. Raises DataError."""
    found = record.evaluations(run_dir)
    if chosen is None:
        evaluation = record.headline(found)
        if evaluation is not None:
            return evaluation
        raise DataError(
            f"{run_dir}: no complete evaluation;"
            f" `python launch.py --run-dir {run_dir} --stages eval` makes one"
        )
    for evaluation in found:
        if evaluation.number == chosen:
            return evaluation
    there = ", ".join(str(evaluation.number) for evaluation in found) or "none"
    raise DataError(f"{run_dir}/eval/{chosen}: no finished evaluation; there are: {there}")


def group_by_protocol(entries: list[Entry]) -> list[list[Entry]]:
    """Put runs of equal protocols together, in the order of their first run."""
    groups: list[list[Entry]] = []
    for entry in entries:
        for group in groups:
            if group[0].protocol == entry.protocol:
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def protocol_warning(groups: list[list[Entry]]) -> str:
    """Say in which settings the protocols of several groups differ; "" for a single group."""
    if len(groups) == 1:
        return ""
    protocols = [group[0].protocol for group in groups]
    lines = [f"{len(groups)} protocols: numbers of different tables cannot be compared. They differ in"]
    for key in dict.fromkeys(key for protocol in protocols for key in protocol):
        values = [str(protocol.get(key, "–")) for protocol in protocols]
        if len(set(values)) > 1:
            lines.append(f"  {key}: {' | '.join(value[:16] for value in values)}")
    return "\n".join(lines)


def headline_names(group: list[Entry]) -> list[str]:
    """Metrics of a group that stand in its table."""
    names = dict.fromkeys(name for entry in group for name in entry.evaluation.headline_names)
    return [name for name in names if about(group, name).get("headline", True)]


def about(group: list[Entry], name: str) -> dict[str, Any]:
    """A metric's own description, from the first evaluation that has it; {} if all are old."""
    for entry in group:
        if name in entry.evaluation.about:
            return entry.evaluation.about[name]
    return {}


def direction(group: list[Entry], name: str) -> str:
    """Which way a metric is better: "lower", "higher" or "none"."""
    return str(about(group, name).get("direction", "none"))


def headings(group: list[Entry], names: list[str]) -> list[str]:
    """Names of metrics with their arrows."""
    return [with_arrow(name, direction(group, name)) for name in names]


def attribute_rows(group: list[Entry]) -> Rows:
    """Accuracy of each attribute, marked if the model does not read it."""
    names = dict.fromkeys(name for entry in group for name in entry.evaluation.per_attribute)
    rows = []
    for name in names:
        cells, real = [], None
        for entry in group:
            row = entry.evaluation.per_attribute.get(name, {})
            mark = "" if name in entry.read else " (not read)"
            cells.append(number(row.get("accuracy")) + mark)
            if real is None:
                real = row.get("real_accuracy")
        rows.append([name, *cells, number(real)])
    return ["attribute accuracy", *(entry.name for entry in group), "real images"], rows


def notes(group: list[Entry], mark: str = "*") -> list[str]:
    """Lines that explain how to read a table; `mark` names what marks the best value."""
    lines = [
        f"↓ lower is better, ↑ higher is better; {mark} better than every other variant by more than the"
        " noise; ± half of the 95 % interval, or the deviation over seeds."
    ]
    names = [name for name in headline_names(group) if about(group, name).get("over_read_attributes")]
    if names and read_differs(group):
        counts = ", ".join(f"{entry.name} {len(entry.read)}" for entry in group)
        lines.append(
            f"These cover only the attributes that a model reads ({counts}), so they are not comparable here:"
            f" {', '.join(names)}."
        )
    return lines


def comparable(group: list[Entry], metric: str) -> bool:
    """Whether a metric means the same for all models of a group."""
    return not (about(group, metric).get("over_read_attributes") and read_differs(group))


def read_differs(group: list[Entry]) -> bool:
    """Whether the models of a group read different attributes."""
    return len({entry.read for entry in group}) > 1

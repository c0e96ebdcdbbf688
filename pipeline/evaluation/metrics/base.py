"""The interface of a metric, and the sections of metrics.json that its values become."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.statistics import finite

Direction = Literal["lower", "higher", "none"]
Interval = tuple[float, float]
Z_95 = 1.959964  # the normal 97.5 % quantile


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number and everything a reader needs to understand it."""

    value: float
    direction: Direction  # which way is better
    meaning: str  # one line
    unit: str = ""  # empty for a ratio or share
    n: int  # how many images or samples were measured
    interval: Interval | None = None  # 95 %; None if there is no estimate
    ceiling: float | None = None  # a good reference, see ceiling_name
    floor: float | None = None  # a bad reference, see floor_name
    ceiling_name: str = "real images"  # whose value the ceiling is
    floor_name: str = "knowing nothing"  # whose value the floor is
    headline: bool = True  # False keeps it out of tables, because it stands beside another value
    over_read_attributes: bool = (
        False  # measured over the model's own attributes: models that read others differ
    )


class Metric:
    """One metric. `needs` names the parts of the evidence that it reads."""

    needs: tuple[str, ...] = ()

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield (name, Value) or (name, table).

        Only rank 0 calls it, after all ranks computed `needs`.
        """
        raise NotImplementedError


def collect(found: dict[str, Any], groups: dict[str, str] | None = None) -> dict[str, Any]:
    """Sort {name: Value or table} into the sections of metrics.json.

    `groups` names the metric of the registry that each name belongs to.

    metrics, intervals, ceilings, floors and about (direction, meaning, unit, n) are keyed by
    metric. Every table becomes a section of its own. A value that is not finite becomes null, and
    such a bound is left out: JSON knows no NaN.
    """
    values = {name: value for name, value in found.items() if isinstance(value, Value)}
    sections: dict[str, Any] = {"metrics": {}, "intervals": {}, "ceilings": {}, "floors": {}, "about": {}}
    for name, value in values.items():
        sections["metrics"][name] = finite(value.value)
        sections["about"][name] = about(value) | {"group": (groups or {}).get(name, "")}
        if value.interval is not None and all(math.isfinite(end) for end in value.interval):
            sections["intervals"][name] = [float(end) for end in value.interval]
        if value.ceiling is not None and math.isfinite(value.ceiling):
            sections["ceilings"][name] = float(value.ceiling)
        if value.floor is not None and math.isfinite(value.floor):
            sections["floors"][name] = float(value.floor)
    tables = {name: table for name, table in found.items() if name not in values}
    return sections | tables


def about(value: Value) -> dict[str, Any]:
    """Everything about a value except its numbers, for the section "about"."""
    return {
        "direction": value.direction,
        "meaning": value.meaning,
        "unit": value.unit,
        "n": int(value.n),
        "headline": value.headline,
        "ceiling_name": value.ceiling_name,
        "floor_name": value.floor_name,
        "over_read_attributes": value.over_read_attributes,
    }


def standard_error(x: np.ndarray) -> float:
    """Return the standard error of the mean of `x` [N]; nan for fewer than two rows."""
    if len(x) < 2:
        return math.nan
    return float(x.std(ddof=1) / math.sqrt(len(x)))


def around(value: float, error: float) -> Interval | None:
    """Return the normal 95 % interval of a value; None if its standard error is not finite."""
    if not math.isfinite(error):
        return None
    return float(value - Z_95 * error), float(value + Z_95 * error)


def normal_interval(x: np.ndarray) -> Interval | None:
    """Return the normal 95 % interval of the mean of `x` [N], or None for fewer than two rows."""
    return around(float(x.mean()), standard_error(x))

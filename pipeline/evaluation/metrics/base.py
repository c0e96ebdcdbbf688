"""What a metric is, and how what it yields becomes the sections of metrics.json."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.evidence import Evidence


class Value(NamedTuple):
    """A number and what it is to be read against."""

    value: float
    interval: tuple[float, float] | None = None  # 95 %
    ceiling: float | None = None  # what a perfect model would reach
    floor: float | None = None  # what knowing nothing reaches


class Metric:
    """One metric; `needs` are attributes of Evidence."""

    needs: tuple[str, ...] = ()

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield (name, Value or table); rank 0 alone calls it."""
        raise NotImplementedError


def collect(found: dict[str, Any]) -> dict[str, Any]:
    """{name: Value or table} -> the sections metrics, intervals, ceilings and floors, and every table under its own name.

    What is not finite becomes null: JSON knows no NaN.
    """
    values = {name: value for name, value in found.items() if isinstance(value, Value)}
    sections: dict[str, Any] = {
        "metrics": {name: finite(v.value) for name, v in values.items()},
        "intervals": {
            name: [finite(end) for end in v.interval] for name, v in values.items() if v.interval is not None
        },
        "ceilings": {name: finite(v.ceiling) for name, v in values.items() if v.ceiling is not None},
        "floors": {name: finite(v.floor) for name, v in values.items() if v.floor is not None},
    }
    return sections | {name: table for name, table in found.items() if name not in values}


def finite(x: float) -> float | None:
    """`x`, or None for what JSON does not know."""
    return float(x) if math.isfinite(x) else None


def standard_error(x: np.ndarray) -> float:
    """Of the mean of rows [N]."""
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def normal_interval(x: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of rows [N]."""
    half = 1.959964 * standard_error(x)
    return float(x.mean() - half), float(x.mean() + half)


def around(value: float, error: float) -> tuple[float, float] | None:
    """95 % interval of a value with this standard error; None where it is not known."""
    return (value - 1.959964 * error, value + 1.959964 * error) if math.isfinite(error) else None

"""What all benchmarks share: contenders called in turn, medians, and ratios within each round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.config.schema import RunConfig
from pipeline.data.sources.celeba import Celeba

Contenders = dict[str, Callable[[], float]]
Result = dict[str, Any]  # one benchmark: title, unit, protocol, repeats, contenders, ratios


@dataclass(frozen=True)
class Bench:
    """What every benchmark is given. Shards of `config` are there; all that is written goes below `folder`, which is temporary."""

    config: RunConfig
    celeba: Celeba  # the source, its images as files
    repeats: int
    seconds: float  # that one repetition of a contender takes, roughly
    precisions: tuple[str, ...]  # of training; fp32 is always among them

    @property
    def folder(self) -> Path:
        """Removed at the end."""
        return Path(self.config.runs_dir)


def summary(values: list[float]) -> dict[str, Any]:
    """The values of all repetitions, their median and extremes."""
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def measure(
    contenders: Contenders,
    repeats: int,
    ratios: dict[tuple[str, str], float] | None = None,
    warm_up: bool = False,
) -> Result:
    """Call the contenders in turn, `repeats` rounds: what slows the machine for a while slows all alike.

    `ratios`: {(contender, reference): least ratio aimed at}, computed within each round. `warm_up`: one more round first, not counted.
    """
    rounds = [{name: run() for name, run in contenders.items()} for _ in range(repeats + warm_up)][warm_up:]
    compared = []
    for (name, reference), target in (ratios or {}).items():
        ratio = summary([values[name] / values[reference] for values in rounds])
        compared.append(
            {
                "contender": name,
                "reference": reference,
                "target": target,
                "met": ratio["median"] >= target,
                **ratio,
            }
        )
    figures = {name: summary([values[name] for values in rounds]) for name in contenders}
    return {"repeats": repeats, "contenders": figures, "ratios": compared}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

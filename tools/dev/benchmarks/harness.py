"""Shared by all benchmarks: contenders that take turns, medians, and ratios within each round."""

from __future__ import annotations

import time
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
    """The input of every benchmark.

    The shards of `config` exist; everything is written below `folder`.
    """

    config: RunConfig
    celeba: Celeba  # the source, its images as files
    repeats: int
    seconds: float  # rough length of one repetition of a contender
    precisions: tuple[str, ...]  # of training; fp32 is always among them

    @property
    def folder(self) -> Path:
        """The temporary folder of the benchmark, removed at the end."""
        return Path(self.config.runs_dir)


def summary(values: list[float]) -> dict[str, Any]:
    """Return the values of all repetitions with their median and extremes."""
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def measure(
    contenders: Contenders,
    repeats: int,
    ratios: dict[tuple[str, str], float] | None = None,
    warm_up: bool = False,
) -> Result:
    """Call the contenders in turn for `repeats` rounds.

    A slow phase of the machine then slows all of them alike. `ratios` is {(contender, reference):
    target}; a ratio is computed within each round. `warm_up` adds a first round that does not
    count.
    """
    rounds = []
    for _ in range(repeats + warm_up):
        rounds.append({name: run() for name, run in contenders.items()})
    if warm_up:
        rounds = rounds[1:]
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


def endless_rate(action: Callable[[], object], seconds: float, items: int) -> float:
    """Return items per second of an action on `items` items, repeated for about `seconds`.

    On a GPU the clock stops when the device is done.
    """
    synchronize()
    start = time.perf_counter()
    calls = 0
    while time.perf_counter() - start < seconds:
        action()
        synchronize()
        calls += 1
    return calls * items / (time.perf_counter() - start)


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

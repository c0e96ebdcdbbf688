"""What happens around the steps of a loop: reading results one step late, counting bad ones, metrics, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from logging import Logger
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.rundir.metrics_log import MetricsLog

T = TypeVar("T")
LOG_LINE_EVERY_S = 15.0


class TrainingDiverged(UserError):
    """The loss was not finite for too many steps in a row."""


class Record(NamedTuple):
    """One step: numbers still on their way from the device, and what the host knew already."""

    step: int  # optimizer steps done, this one included
    values: dict[str, float]  # known on the host
    names: tuple[str, ...]
    numbers: Tensor  # float64 [len(names)], named by `names`; has "bad" and "stop"
    indices: np.ndarray  # samples of this rank


class StepMonitor:
    """Every rank has one and reads the same reduced numbers at the same step; only rank 0 has `metrics` to write.

    `testify(bad_steps)` writes down what this rank knows about the bad steps before the run stops, and returns the file.
    """

    def __init__(
        self,
        metrics: MetricsLog | None,
        log: Logger,
        interval: int,
        max_bad: int,
        step: int,
        last: int,
        batch: int,
        testify: Callable[[list[tuple[Record, dict[str, float]]]], object],
    ) -> None:
        self.testify, self.bad_steps = testify, list[tuple[Record, dict[str, float]]]()
        self.metrics, self.log, self.interval, self.max_bad = metrics, log, interval, max_bad
        self.first, self.last, self.batch = step, last, batch
        self.pending: tuple[Record, Tensor, torch.cuda.Event | None] | None = None
        self.bad = 0
        self.start = self.window_start = self.line = time.monotonic()
        self.window_step, self.waited = step, 0.0
        self.bar = (
            tqdm(total=last, initial=step, desc="train", leave=False)
            if metrics and sys.stderr.isatty()
            else None
        )

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        """Pass `items` on and count the time spent waiting for them."""
        iterator = iter(items)
        while True:
            before = time.monotonic()
            item = next(iterator, None)
            self.waited += time.monotonic() - before
            if item is None:
                return
            yield item

    def push(self, record: Record) -> bool:
        """Start copying this step's numbers to the host, read those of the step before: was a stop agreed there?"""
        stop = self.flush()
        on_gpu = record.numbers.is_cuda
        host = record.numbers.to("cpu", non_blocking=True) if on_gpu else record.numbers
        event = torch.cuda.Event() if on_gpu else None
        if event:
            event.record()
        self.pending = (record, host, event)
        return stop

    def flush(self) -> bool:
        """Read the pending step. Raises TrainingDiverged on every rank at the same step."""
        if self.pending is None:
            return False
        (record, host, event), self.pending = self.pending, None
        if event:
            event.synchronize()
        values = record.values | dict(zip(record.names, host.tolist(), strict=True))
        stop, bad = values.pop("stop") > 0, values.pop("bad") > 0
        self._count_bad(bad, record, values)
        if record.step % self.interval == 0:
            self._write(record.step, values)
        self._progress(record.step, values)
        return stop

    def _count_bad(self, bad: bool, record: Record, values: dict[str, float]) -> None:
        self.bad += bad
        self.bad_steps = [*self.bad_steps, (record, values)] if bad else []
        if bad:
            self.log.warning(
                "step %d: the loss or its gradient is not finite; the step was skipped: %s",
                record.step,
                values,
            )
        if len(self.bad_steps) > self.max_bad:
            raise TrainingDiverged(
                f"step {record.step}: {len(self.bad_steps)} steps in a row without a finite loss and gradient; last terms {values}; "
                f"terms and samples of all of them are in {self.testify(self.bad_steps)}; lower optim.lr, or raise train.kl_warmup_images"
            )

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        elapsed = max(now - self.window_start, 1e-9)
        rates = {
            "images_per_s": (step - self.window_step) * self.batch / elapsed,
            "data_wait_share": self.waited / elapsed,
        }
        if self.metrics:
            numbers = values | rates | {"bad_steps": float(self.bad)}
            self.metrics.append(step, {f"train/{k}": v for k, v in numbers.items()})
        self.window_start, self.window_step, self.waited = now, step, 0.0

    def _progress(self, step: int, values: dict[str, float]) -> None:
        if self.bar:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(loss=f"{values['loss']:.1f}")
        now = time.monotonic()
        if not self.bar and now - self.line >= LOG_LINE_EVERY_S:
            self.line = now
            rate = (step - self.first) / (now - self.start)
            left = (self.last - step) / rate if rate else float("nan")
            text = "step %d/%d, loss %.1f (nll %.1f, kl %.1f), %.0f images/s, %.0f s left"
            self.log.info(
                text, step, self.last, values["loss"], values["nll"], values["kl"], rate * self.batch, left
            )

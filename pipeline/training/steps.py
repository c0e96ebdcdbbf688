"""The work around the steps of the loop: read results one step late, count bad steps, log progress."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.config.schema import TrainConfig
from pipeline.errors import UserError
from pipeline.runtime.logs import Pace
from pipeline.training.checkpoints.saver import Recorder

T = TypeVar("T")


class TrainingDiverged(UserError):
    """The loss was not finite for too many steps in a row."""


class Record(NamedTuple):
    """One step: values that the host knows, and numbers that are still on the device."""

    step: int  # optimizer steps done, this one included
    values: dict[str, float]  # known on the host
    names: tuple[str, ...]
    numbers: Tensor  # float64 [len(names)], one copy brings them to the host; includes "bad" and "stop"
    indices: np.ndarray  # samples of this rank


BadSteps = list[tuple[Record, dict[str, float]]]


class StepMonitor:
    """Reads the numbers of each step. Every rank has one and reads the same numbers at the same step.

    `testify(bad_steps)` writes what this rank knows about a divergence and returns the file.
    """

    def __init__(
        self,
        train: TrainConfig,
        first: int,
        last: int,
        recorder: Recorder,
        log: logging.Logger,
        testify: Callable[[BadSteps], object],
    ) -> None:
        self.train = train
        self.first = first
        self.last = last
        self.recorder = recorder
        self.log = log
        self.testify = testify
        self.n_bad = 0  # bad steps of this attempt
        self.bad_in_a_row: BadSteps = []
        self.pending: tuple[Record, Tensor, torch.cuda.Event | None] | None = None
        self.start = self.window_start = time.monotonic()
        self.pace = Pace()
        self.window_step = first
        self.waited = 0.0  # seconds of this window spent waiting for data
        self.bar: tqdm | None = None
        if log.isEnabledFor(logging.INFO) and sys.stderr.isatty():  # other ranks log only warnings
            self.bar = tqdm(total=last, initial=first, desc="train", leave=False)

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        """Pass `items` on, and count the seconds spent waiting for them."""
        iterator = iter(items)
        while True:
            before = time.monotonic()
            item = next(iterator, None)
            self.waited += time.monotonic() - before
            if item is None:
                return
            yield item

    def push(self, record: Record) -> bool:
        """Start to copy this step's numbers to the host, and read those of the step before.

        Returns whether the ranks agreed in the step before to stop.
        """
        stop = self.flush()
        numbers, copied = record.numbers, None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.pending = (record, numbers, copied)
        return stop

    def flush(self) -> bool:
        """Read the pending step. Raises TrainingDiverged on every rank at the same step."""
        if self.pending is None:
            return False
        record, numbers, copied = self.pending
        self.pending = None
        if copied:
            copied.synchronize()
        values = record.values | dict(zip(record.names, numbers.tolist(), strict=True))
        stop = values.pop("stop") > 0
        bad = values.pop("bad") > 0
        self._count_bad(bad, record, values)
        if record.step % self.train.log_interval == 0:
            self._write(record.step, values)
        self._show_progress(record.step, values)
        return stop

    def _count_bad(self, bad: bool, record: Record, values: dict[str, float]) -> None:
        if not bad:
            self.bad_in_a_row = []
            return
        self.n_bad += 1
        self.bad_in_a_row = [*self.bad_in_a_row, (record, values)]
        self.log.warning(
            "step %d: the loss or its gradient is not finite; the step was skipped: %s", record.step, values
        )
        n = len(self.bad_in_a_row)
        if n > self.train.max_bad_steps:
            file = self.testify(self.bad_in_a_row)
            raise TrainingDiverged(
                f"step {record.step}: {n} steps in a row without a finite loss and gradient; "
                f"last terms {values}; the terms and samples of all of them are in {file}; "
                "lower optim.lr, or raise train.kl_warmup_images"
            )

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        elapsed = max(now - self.window_start, 1e-9)
        images = (step - self.window_step) * self.train.batch_size
        numbers = values | {
            "images_per_s": images / elapsed,
            "data_wait_share": self.waited / elapsed,
            "bad_steps": float(self.n_bad),
        }
        self.recorder.append(step, {f"train/{name}": value for name, value in numbers.items()})
        self.window_start = now
        self.window_step = step
        self.waited = 0.0

    def _show_progress(self, step: int, values: dict[str, float]) -> None:
        if self.bar:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(loss=f"{values['loss']:.1f}")
            return
        if not self.pace.due():
            return
        steps_per_s = (step - self.first) / (time.monotonic() - self.start)
        seconds_left = (self.last - step) / steps_per_s if steps_per_s else float("nan")
        parts = [f"{name} {values[name]:.1f}" for name in ("nll", "kl") if name in values]
        self.log.info(
            "step %d/%d, loss %.1f%s, %.0f images/s, %.0f s left",
            step,
            self.last,
            values["loss"],
            f" ({', '.join(parts)})" if parts else "",
            steps_per_s * self.train.batch_size,
            seconds_left,
        )

"""Write metrics, and checkpoints in a thread while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.rundir.files import write_json
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.tracking.sync import LiveSync
from pipeline.training.checkpoints.store import Checkpoints


class Saver:
    """Writes one checkpoint at a time; the next `save` waits for it. Only rank 0 has a saver.

    `save` copies the state aside, and a thread writes the copy. The copy takes as much
    host memory as the state; it is page-locked if the state is on a GPU.
    """

    def __init__(self, store: Checkpoints, *before: Callable[[], None]) -> None:
        """Run each of `before` in the thread ahead of every write, e.g. to make metrics durable first."""
        self.store = store
        self.before = before
        self.blocked_s = 0.0  # seconds that training has waited for checkpoints
        self._copies: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy `tensors` and return. Raises StorageError if the last checkpoint could not be written."""
        start = time.monotonic()
        self.wait()
        copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        copied = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            copied = torch.cuda.Event()
            copied.record()
        self._pending = self._pool.submit(self._write, step, copies, meta, copied)
        self.blocked_s += time.monotonic() - start

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._copies:
            self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self._copies[name].copy_(tensor.detach(), non_blocking=True)

    def _write(
        self, step: int, copies: dict[str, Tensor], meta: dict[str, Any], copied: torch.cuda.Event | None
    ) -> None:
        if copied:
            copied.synchronize()  # later training steps queue behind the copies
        for check in self.before:
            check()
        self.store.save(step, copies, meta)

    def poll(self) -> None:
        """Raise StorageError if the pending checkpoint has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the pending checkpoint is durable. Raises StorageError if it failed."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the pending checkpoint, then end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


class Recorder:
    """Takes everything that training reports and writes nothing: the recorder of ranks other than 0."""

    def append(self, step: int, values: dict[str, float]) -> None:
        """Write one record of metrics."""

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], wait: bool) -> None:
        """Start to write a checkpoint; with `wait`, return when it is durable."""

    def poll(self) -> None:
        """Raise StorageError if the pending checkpoint has failed; never waits."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Write done.json."""

    def close(self) -> None:
        """Finish what is pending; called on every way out."""


class MainRecorder(Recorder):
    """Rank 0's recorder: metrics.jsonl, checkpoints, the live feed of MLflow, done.json."""

    def __init__(self, folder: Path, metrics: MetricsLog, saver: Saver, live: LiveSync) -> None:
        self.folder = folder
        self.metrics = metrics
        self.saver = saver
        self.live = live

    def append(self, step: int, values: dict[str, float]) -> None:
        """Write one record to metrics.jsonl."""
        self.metrics.append(step, values)

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], wait: bool) -> None:
        """Record the validation, if there is one, and start to write the checkpoint that vouches for it."""
        if meta["validation"]:
            self.metrics.append(step, meta["validation"])
        self.saver.save(step, tensors, meta)
        if wait:
            self.saver.wait()

    def poll(self) -> None:
        """Raise StorageError if the pending checkpoint has failed; never waits."""
        self.saver.poll()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write done.json: training has reached its configured length."""
        blocked_s = round(self.saver.blocked_s, 3)
        write_json(self.folder / "done.json", summary | {"checkpoints_blocked_s": blocked_s})

    def close(self) -> None:
        """Wait for the pending checkpoint, whatever has happened, then stop the live feed."""
        try:
            self.saver.close()
        finally:
            self.live.stop()

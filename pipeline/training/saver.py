"""Checkpoints written while training goes on: the state is copied aside, a thread brings the copy to the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pipeline.training.checkpoint import Checkpoints


class Saver:
    """One checkpoint at a time is on its way; the next `save` waits for it. Rank 0 alone has one.

    The copy lies in page-locked memory where the state is on a GPU, and is made once: 1x the state in host memory.
    """

    def __init__(self, store: Checkpoints, *before: Callable[[], None]) -> None:
        """`before` run in the thread ahead of each write: what a checkpoint vouches for is durable, and the folder still ours."""
        self.store, self.before = store, before
        self.blocked_s = 0.0  # what training waited for, all checkpoints together
        self._copies: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy `tensors` and return; raises StorageError where the checkpoint before could not be written."""
        start = time.monotonic()
        self.wait()
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies = {
            name: self._copies[name].copy_(tensor.detach(), non_blocking=True)
            for name, tensor in tensors.items()
        }
        event = torch.cuda.Event() if any(tensor.is_cuda for tensor in tensors.values()) else None
        if event:
            event.record()
        self._pending = self._pool.submit(self._write, step, copies, meta, event)
        self.blocked_s += time.monotonic() - start

    def _write(
        self, step: int, copies: dict[str, Tensor], meta: dict[str, Any], event: torch.cuda.Event | None
    ) -> None:
        if event:
            event.synchronize()  # the copies are there; later steps are behind them in the stream
        for check in self.before:
            check()
        self.store.save(step, copies, meta)

    def poll(self) -> None:
        """Raise StorageError where the checkpoint on its way has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint on its way is durable. Raises StorageError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

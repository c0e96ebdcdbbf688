"""How busy a node is while it trains: processor, memory, network and GPUs, sampled by one of its ranks."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch

from pipeline.rundir import layout
from pipeline.rundir.metrics_log import MetricsLog, read_metrics
from pipeline.runtime.context import Context

FIRST_S = 10.0  # seconds between two samples at first, as in MLflow
PART = 1 / 200  # of the time since the first sample: the longest training has about a thousand samples
MEGABYTE = 1e6  # bytes


def node_monitor(context: Context) -> AbstractContextManager[object]:
    """Return the monitor of this node; ranks other than the node's first get one that does nothing."""
    if context.ranks.local_rank:
        return nullcontext()
    return NodeMonitor(layout.nodes_dir(context.run_dir), context.log)


class NodeMonitor:
    """A thread that appends samples to `<folder>/<host>.jsonl` between enter and exit.

    The thread sleeps nearly always. A sample that cannot be taken or written ends the samples, never the
    training.
    """

    def __init__(self, folder: Path, log: logging.Logger, first_s: float = FIRST_S) -> None:
        self._host = socket.gethostname().split(".")[0]
        self._file = folder / f"{self._host}.jsonl"
        self._log = log
        self._first_s = first_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="node", daemon=True)

    def __enter__(self) -> NodeMonitor:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread; a disk that hangs does not hold the training."""
        self._end.set()
        self._thread.join(self._first_s)

    def _watch(self) -> None:
        try:
            self._sample_until_the_end()
        except Exception as error:  # of the disk, of psutil, of a damaged file
            self._log.warning("no system metrics of %s from here on: %s", self._host, error)

    def _sample_until_the_end(self) -> None:
        """Go on after the samples of an earlier job of this run on this node."""
        records = read_metrics(self._file)
        step, since = 0, time.time()
        if records:
            step, since = records[-1]["step"], records[0]["time"]
        out = MetricsLog(self._file, step)
        node = Node()
        while not self._end.wait(max(self._first_s, PART * (time.time() - since))):
            step += 1
            out.append(step, {f"system/{self._host}/{name}": value for name, value in node.sample()})
        out.close()


class Node:
    """What this machine says of itself."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._received, self._sent = self._network()
        psutil.cpu_percent()  # the next call returns the mean since this one

    def sample(self) -> Iterator[tuple[str, float]]:
        """Yield (name, value) of this node now, under the names that MLflow gives to them."""
        memory = self._psutil.virtual_memory()
        received, sent = self._network()
        yield "cpu_utilization_percentage", self._psutil.cpu_percent()
        yield "system_memory_usage_percentage", memory.percent
        yield "system_memory_usage_megabytes", memory.used / MEGABYTE
        yield "network_receive_megabytes", received - self._received
        yield "network_transmit_megabytes", sent - self._sent
        try:
            yield from self._gpus()
        except Exception:
            pass  # no NVML, a GPU in parts (MIG), no permission: the other values are still worth having

    def _network(self) -> tuple[float, float]:
        """Return the megabytes (received, sent) since the machine started."""
        counts = self._psutil.net_io_counters()
        if counts is None:  # a container without network
            return 0.0, 0.0
        return counts.bytes_recv / MEGABYTE, counts.bytes_sent / MEGABYTE

    @staticmethod
    def _gpus() -> Iterator[tuple[str, float]]:
        """Ask NVML, which does not disturb the capture of a CUDA graph, about the GPUs of this process."""
        if not torch.cuda.is_available():
            return
        for index in range(torch.cuda.device_count()):
            used = torch.cuda.device_memory_used(index)
            total = torch.cuda.get_device_properties(index).total_memory
            yield f"gpu_{index}_memory_usage_percentage", 100 * used / total
            yield f"gpu_{index}_memory_usage_megabytes", used / MEGABYTE
            yield f"gpu_{index}_utilization_percentage", float(torch.cuda.utilization(index))
            yield f"gpu_{index}_power_usage_watts", torch.cuda.power_draw(index) / 1000

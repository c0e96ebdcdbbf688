"""Write many shards at a time, in worker processes that a stop request or a dead parent ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from pipeline.data.journal import ShardReport
from pipeline.data.writer import ShardTask, write_shard
from pipeline.runtime.preempt import StopFlag, Stopped, serve_parent, worker_pool


def write_shards(tasks: list[ShardTask], processes: int, stop: StopFlag) -> Iterator[ShardReport]:
    """Write the tasks' shards and yield each report as it is ready. `processes` never changes the bytes.

    Raises DataError at the first bad image. After a stop request, the shards in flight are finished,
    then Stopped is raised.
    """
    pool = worker_pool(min(processes, len(tasks)), _start_worker)
    if pool is None:
        for task in tasks:
            _honour(stop)
            yield write_shard(task)
        return
    futures = [pool.submit(write_shard, task) for task in tasks]
    try:
        for future in as_completed(futures):
            if stop.requested:
                for waiting in futures:
                    waiting.cancel()  # no effect on those in flight
            if not future.cancelled():
                yield future.result()
    except BrokenProcessPool:
        _honour(stop)  # a signal to the whole job reached a worker that was still starting
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if any(future.cancelled() for future in futures):
        _honour(stop)


def _honour(stop: StopFlag) -> None:
    if stop.requested:
        raise Stopped("asked to stop between two shards; finished ones are kept")


def _start_worker() -> None:
    torch.set_num_threads(1)
    serve_parent()

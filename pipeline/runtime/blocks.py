"""Work on many images in fixed blocks, so that no result depends on the number of ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.distributed import Ranks
from pipeline.runtime.logs import progress
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.runtime.split import ceil_div, share

log = logging.getLogger("cvae.blocks")


@dataclass
class Watch:
    """How a long piece of work is watched: its name in lines about progress, its end by a stop signal."""

    what: str
    stop: StopFlag = field(default_factory=StopFlag)
    gathering_s: float = 0.0  # what `map_blocks` spent in exchanges between ranks


@torch.no_grad()
def map_blocks(
    function: Callable[[np.ndarray], dict[str, Tensor]],
    n: int,
    block: int,
    ranks: Ranks,
    watch: Watch | None = None,
) -> dict[str, np.ndarray]:
    """Call `function` on the indices 0 .. n - 1, `block` at a time; return its rows [n, ...] by name.

    Every rank gets all rows. All ranks take part, and each does an even share of the blocks. A block never
    depends on its rank, so neither do the rows. With a `watch`, progress is told now and then, and a stop
    signal to any rank raises Stopped on all of them.
    """
    mine = list(share(ceil_div(n, block), ranks.rank, ranks.world_size))
    watched: Iterable[int] = mine or [0]
    if watch is not None:
        watched = progress(watched, len(mine or [0]), watch.what, log)
    results = []
    for i in watched:
        if watch is not None and watch.stop.requested:
            break
        results.append(function(np.arange(i * block, min(n, (i + 1) * block))))
    if watch is not None:
        stop_together(watch.stop, ranks)
    rows = {name: torch.cat([result[name] for result in results]) for name in results[0]}
    if not mine:  # this rank did the first block, to learn the shapes, and contributes nothing
        rows = {name: x[:0] for name, x in rows.items()}
    start = time.monotonic()
    gathered = {name: ranks.gather_rows(x).cpu().numpy() for name, x in rows.items()}
    if watch is not None:
        watch.gathering_s += time.monotonic() - start
    return gathered


def stop_together(stop: StopFlag, ranks: Ranks) -> None:
    """Raise Stopped on every rank if any rank was asked to stop (all ranks take part)."""
    asked = torch.tensor([stop.requested], dtype=torch.float64, device=ranks.device)
    if ranks.reduce_sum(asked).item():
        raise Stopped("by a signal; the next attempt starts again")

"""Work on many images in fixed blocks, so that no result depends on the number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.distributed import Ranks
from pipeline.runtime.split import ceil_div, share


@torch.no_grad()
def map_blocks(
    function: Callable[[np.ndarray], dict[str, Tensor]],
    n: int,
    block: int,
    ranks: Ranks,
    clock: dict[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """Call `function` on the indices 0 .. n - 1, `block` at a time; return its rows [n, ...] by name.

    Every rank gets all rows. All ranks take part, and each does an even share of the blocks. A block never
    depends on its rank, so neither do the rows. `clock`: its entry "gathering" grows by the seconds that the
    exchange took.
    """
    mine = list(share(ceil_div(n, block), ranks.rank, ranks.world_size))
    results = [function(np.arange(i * block, min(n, (i + 1) * block))) for i in mine or [0]]
    rows = {name: torch.cat([result[name] for result in results]) for name in results[0]}
    if not mine:  # this rank did the first block, to learn the shapes, and contributes nothing
        rows = {name: x[:0] for name, x in rows.items()}
    start = time.monotonic()
    gathered = {name: ranks.gather_rows(x).cpu().numpy() for name, x in rows.items()}
    if clock is not None:
        clock["gathering"] = clock.get("gathering", 0.0) + time.monotonic() - start
    return gathered

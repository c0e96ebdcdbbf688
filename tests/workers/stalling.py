"""One rank of two that train; one of them stalls, so that the watchdog must end both."""

import logging
import sys
import time
from pathlib import Path

import torch

from pipeline.runtime.distributed import process_group
from pipeline.runtime.watchdog import Watchdog

folder, mode = Path(sys.argv[1]), sys.argv[2]
with (
    process_group(timeout_s=60, threads=1) as ranks,
    Watchdog(ranks, 2.0, folder, logging.getLogger("test")) as dog,
):
    for step in range(400 if mode == "brief" else 100_000):
        if step == 10:
            (folder / "step10").touch()
            if mode == f"stick{ranks.rank}":  # as if its data did not come
                time.sleep(600)
        dog.at(step)
        time.sleep(0.005)
        ranks.reduce_sum(torch.ones(1))

"""One rank: the eval stage of the run directory that is the argument."""

import logging
import sys
from pathlib import Path

from pipeline.config import load as configuration
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import process_group
from pipeline.runtime.preempt import StopFlag
from pipeline.stages import eval as stage

run_dir = Path(sys.argv[1])
with process_group(timeout_s=60, threads=1) as ranks:
    stage.run(
        configuration.load([run_dir / "config.yaml"]),
        Context(run_dir, ranks, StopFlag(), logging.getLogger("test")),
    )

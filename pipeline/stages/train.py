"""The train stage: fit the whole model.

It can stop and resume at any step, and any number of ranks follows the same trajectory.
"""

from __future__ import annotations

from pipeline.config.schema import RunConfig
from pipeline.runtime.context import Context
from pipeline.training import loop
from pipeline.training.phases import phase


def run(config: RunConfig, context: Context) -> None:
    """Train until `train.images` images were seen (all ranks). Raises what `loop.run` raises."""
    loop.run(phase("train", config), context)

"""The steer stage: train the guides, then the network by which the control reads and moves codes.

The network's training can stop and resume at any step, and any number of ranks follows the same
trajectory. A guide that was interrupted starts again.
"""

from __future__ import annotations

from pipeline.config.schema import RunConfig
from pipeline.runtime.context import Context
from pipeline.training import loop
from pipeline.training.classify.guides import train_guides
from pipeline.training.phases import phase


def run(config: RunConfig, context: Context) -> None:
    """Steer until `steer.images` images were decoded (all ranks). Raises what `loop.run` raises."""
    steering = phase("steer", config)  # refuses a run without this stage before anything is trained
    train_guides(config, context)
    loop.run(steering, context)

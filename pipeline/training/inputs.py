"""The data of one rank: training batches, held-out images, calibration images."""

from __future__ import annotations

import json
import logging

from pipeline.config.schema import RunConfig
from pipeline.data.loader import TrainBatches
from pipeline.data.staging import open_shards, staged
from pipeline.errors import DataError
from pipeline.rundir import layout
from pipeline.runtime.distributed import Ranks
from pipeline.training.validation import calibration_part, whole_split


class Inputs:
    """Opens the shards on one rank (all ranks).

    Raises DataError if ranks disagree about which shards are damaged: their batches would differ.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, log: logging.Logger) -> None:
        self.config = config
        self.ranks = ranks
        data = config.data
        folder = staged(layout.shards_dir(config), data.stage_to, log, data.damaged)
        self.shards = open_shards(folder, "train", data)
        val = open_shards(folder, "val", data)
        self.excluded = self.shards.excluded | val.excluded  # damaged shard -> number of its samples
        mine = json.dumps(self.excluded)
        if ranks.text_from_main(mine) != mine:
            listed = ", ".join(self.excluded) or "none"
            raise DataError(
                f"{folder}: rank {ranks.rank} finds other damaged shards than rank 0: {listed}; "
                "check that all nodes read the same files"
            )
        self.attributes = data.attributes or self.shards.attribute_names
        self.held_out = whole_split(val, self.attributes)
        self.whole_training = whole_split(self.shards, self.attributes)
        self.calibration = calibration_part(self.shards, self.attributes)

    def batches(self, noise_width: int, stream: int) -> TrainBatches:
        """Return this rank's training batches, with `noise_width` normal numbers for each image.

        `stream`: which random numbers, see pipeline/data/order.py.
        """
        config, ranks = self.config, self.ranks
        return TrainBatches(
            self.shards,
            config.data,
            config.seed,
            config.train.batch_size,
            noise_width,
            ranks.rank,
            ranks.world_size,
            stream,
        )

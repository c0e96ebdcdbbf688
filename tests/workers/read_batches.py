"""Rank R of two reads the batches of six steps; it waits for a line before each further step."""

import sys
from pathlib import Path

from pipeline.config.load import load
from pipeline.data.loader import TrainBatches
from pipeline.data.staging import open_shards
from pipeline.rundir import layout

config = load([Path(sys.argv[1])])
rank = int(sys.argv[2])
shards = open_shards(layout.shards_dir(config), "train", config.data)
batches = TrainBatches(shards, config.data, 0, 8, 4, rank, 2)
for step in range(6):
    batches.at(step)
    print(step, flush=True)
    sys.stdin.readline()
shards.close()

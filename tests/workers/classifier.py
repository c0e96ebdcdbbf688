"""One rank of a classifier training: gradients, weights and a stop, noted for the test."""

import logging
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import load as configuration
from pipeline.config.schema import DataConfig
from pipeline.data.loader import TrainBatches
from pipeline.data.shards import Shards
from pipeline.evaluation.classifier import AttributeNet
from pipeline.rundir import layout
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import process_group
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import classifier as stage
from pipeline.training.classify import supervised
from pipeline.training.optim import Precision

BATCH = 7  # the shares of 3 ranks are unequal

run_dir, out = map(Path, sys.argv[1:])
config = configuration.load([run_dir / "config.yaml"])
with process_group(timeout_s=60, threads=1) as ranks:
    shards = Shards(layout.shards_dir(config), "train")
    source = TrainBatches(shards, DataConfig(), 0, BATCH, 0, ranks.rank, ranks.world_size)
    torch.manual_seed(0)
    net = AttributeNet(len(shards.attribute_names))
    model = DistributedDataParallel(net) if ranks.world_size > 1 else net
    x, y, _ = source.to_device(source.at(0), ranks.device, torch.float32)
    optimizer, precision = torch.optim.SGD(net.parameters(), 0.0), Precision("fp32", ranks)
    supervised.train_step(model, optimizer, precision, x, y, ranks, BATCH)
    if ranks.is_main:
        torch.save({name: p.grad for name, p in net.named_parameters()}, out / "gradients.pt")
    stop = StopFlag()
    stop.requested = ranks.rank == ranks.world_size - 1
    try:
        stage.run(config, Context(run_dir, ranks, stop, logging.getLogger("test")))
    except Stopped:
        (out / f"stopped{ranks.rank}").touch()

"""Supervised training of attribute classifiers, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.schema import ClassifierConfig, DataConfig, OptimConfig
from pipeline.data.loader import Prefetcher, TrainBatches, to_float
from pipeline.data.order import FIRST_STREAM
from pipeline.data.shards import Shards
from pipeline.errors import ConfigError
from pipeline.runtime.blocks import map_blocks
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.logs import progress
from pipeline.runtime.preempt import Stopped
from pipeline.runtime.split import ceil_div
from pipeline.training.optim import Precision, learning_rate, make_optimizer

BLOCK = 100  # images per forward pass when measuring
WARMUP = 0.1  # share of the training over which the learning rate rises


def unchanged(x: Tensor, step: int) -> Tensor:
    """Leave the images of a step as they are."""
    return x


def fit(
    net: nn.Module,
    settings: ClassifierConfig,
    shards: Shards,
    val: Shards,
    context: Context,
    change: Callable[[Tensor, int], Tensor] = unchanged,
) -> None:
    """Train `net` with AdamW and a cosine over `epochs` passes (all ranks call it).

    `change` alters a rank's images of a step. The trajectory is the same on any number of ranks.
    Raises Stopped on every rank after a stop signal.
    """
    ranks, size = context.ranks, settings.batch_size
    if size < ranks.world_size:
        raise ConfigError(
            f"key 'classifier.batch_size': got {size}, expected at least one image for each of"
            f" {ranks.world_size} ranks"
        )
    model: nn.Module = DistributedDataParallel(net) if ranks.world_size > 1 else net
    images = settings.epochs * len(shards)
    optim = OptimConfig(
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_images=int(WARMUP * images),
        final_lr_fraction=0.0,
    )
    optimizer = make_optimizer(net, optim)
    precision = Precision(settings.precision, ranks)
    # Runs share a classifier, so it stays the one that it has always been: stream 1.
    source = TrainBatches(
        shards, DataConfig(), settings.seed, size, 0, ranks.rank, ranks.world_size, FIRST_STREAM
    )
    steps = ceil_div(images, size)
    batches = Prefetcher(source.at, 0, steps)
    try:
        for step, batch in enumerate(progress(batches, steps, "training", context.log)):
            optimizer.param_groups[0]["lr"] = learning_rate(step * size, images, optim)
            x, y, _ = source.to_device(batch, ranks.device, torch.float32)
            loss = train_step(model, optimizer, precision, change(x, step), y, ranks, size)
            mine = [loss, float(context.stop.requested)]
            total = ranks.reduce_sum(torch.tensor(mine, dtype=torch.float64, device=ranks.device))
            loss_sum, stops = total.tolist()
            if stops:
                raise Stopped(f"a classifier stopped at step {step}; the next attempt starts it again")
            passes = (step + 1) * size // len(shards)
            if passes > step * size // len(shards):  # a pass over the training images ended
                accuracy = ((predict(net, val, ranks) > 0) == val.attributes()).mean()
                context.log.info(
                    "epoch %d of %d: loss %.3f nats, val accuracy %.4f",
                    passes,
                    settings.epochs,
                    loss_sum / size,
                    accuracy,
                )
    finally:
        shards.close()  # first: the prefetch thread may wait for a tar
        batches.close()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    x: Tensor,
    y: Tensor,
    ranks: Ranks,
    batch_size: int,
) -> float:
    """Make one step on this rank's share; return its part of the global batch's summed loss, nats."""
    with precision.autocast():
        logits = model(x)
    loss = F.binary_cross_entropy_with_logits(logits.float(), y, reduction="sum")
    optimizer.zero_grad(set_to_none=True)
    # Shares may be unequal. W / N per image makes DDP's mean over W ranks the exact mean over the
    # global batch of N.
    precision.scaler.scale(loss * (ranks.world_size / batch_size)).backward()
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return float(loss.detach())


def predict(net: nn.Module, shards: Shards, ranks: Ranks) -> np.ndarray:
    """Return float32 logits [N, A] of a whole split, on every rank (all ranks take part)."""

    def logits(indices: np.ndarray) -> dict[str, Tensor]:
        images, _ = shards.gather(indices)
        return {"logits": net(to_float(torch.from_numpy(images).to(ranks.device)))}

    return map_blocks(logits, len(shards), BLOCK, ranks)["logits"]

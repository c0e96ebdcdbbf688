"""The classifier stage: train the attribute classifier and fix its thresholds on val."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.schema import ClassifierConfig, DataConfig, OptimConfig, RunConfig
from pipeline.data.loader import Batch, Prefetcher, TrainBatches, to_float
from pipeline.data.order import FIRST_STREAM
from pipeline.data.shards import Shards
from pipeline.data.staging import open_shards, staged
from pipeline.errors import ConfigError
from pipeline.evaluation import classifier
from pipeline.evaluation.metrics.statistics import best_threshold
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.blocks import map_blocks
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.logs import progress
from pipeline.runtime.preempt import Stopped
from pipeline.runtime.split import ceil_div
from pipeline.training.optim import Precision, learning_rate, make_optimizer

BLOCK = 100  # images per forward pass when measuring
WARMUP = 0.1  # share of the training over which the learning rate rises


def run(config: RunConfig, context: Context) -> None:
    """Train on every attribute and write the classifier's files (all ranks call it).

    metrics.json is written last. A finished classifier is left alone. An interrupted training
    starts again, which takes minutes. Raises Stopped on every rank after a stop signal.
    """
    ranks, folder = context.ranks, layout.classifier_dir(config)
    there = "there" if (folder / "metrics.json").exists() else ""
    if ranks.text_from_main(there):  # one answer for all ranks
        context.log.info("%s is already there", folder)
        return
    shards = staged(layout.shards_dir(config), config.data.stage_to, context.log, config.data.damaged)
    splits = {name: open_shards(shards, name, config.data) for name in ("train", "val", "test")}
    start = time.monotonic()
    net = train(config.classifier, splits["train"], splits["val"], context)
    logits = {name: predict(net, splits[name], ranks) for name in ("val", "test")}
    if ranks.is_main:
        scores = measure(logits, splits)
        classifier.save(folder, net, splits["train"].attribute_names, splits["train"].size)
        write_json(folder / "metrics.json", {**scores, "seconds": round(time.monotonic() - start, 1)})
        for name, values in scores.items():
            shown = [f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)]
            context.log.info("%s: %s", name, ", ".join(shown))
    ranks.barrier()  # no rank goes on before the files are there


def measure(logits: dict[str, np.ndarray], splits: dict[str, Shards]) -> dict[str, dict[str, Any]]:
    """Score the logits [N, A] of val and test.

    Thresholds come from val alone; test is only measured.
    """
    names = splits["val"].attribute_names
    labels = {name: splits[name].attributes().astype(bool) for name in logits}
    thresholds = [best_threshold(logits["val"][:, i], labels["val"][:, i]) for i in range(len(names))]
    fixed = np.array(thresholds)
    return {name: classifier.scores(logits[name], labels[name], fixed, names) for name in logits}


def train(
    settings: ClassifierConfig, shards: Shards, val: Shards, context: Context
) -> classifier.AttributeNet:
    """Train with AdamW and a cosine over `epochs` passes (all ranks call it).

    The trajectory is the same on any number of ranks.
    """
    ranks, size = context.ranks, settings.batch_size
    if size < ranks.world_size:
        raise ConfigError(
            f"key 'classifier.batch_size': got {size}, expected at least one image for each of"
            f" {ranks.world_size} ranks"
        )
    torch.manual_seed(settings.seed)
    net = classifier.AttributeNet(len(shards.attribute_names)).to(ranks.device)
    model: nn.Module = DistributedDataParallel(net) if ranks.world_size > 1 else net
    images = settings.epochs * len(shards)
    optim = OptimConfig(
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_images=int(WARMUP * images),
        final_lr_fraction=0.0,
    )
    optimizer = make_optimizer(net, optim)
    precision = Precision(settings.precision, ranks.device)
    # Runs share a classifier, so it stays the one that it has always been: stream 1.
    source = TrainBatches(
        shards, DataConfig(), settings.seed, size, 0, ranks.rank, ranks.world_size, FIRST_STREAM
    )
    steps = ceil_div(images, size)
    batches = Prefetcher(source.at, 0, steps)
    try:
        for step, batch in enumerate(progress(batches, steps, "training", context.log)):
            optimizer.param_groups[0]["lr"] = learning_rate(step * size, images, optim)
            loss = train_step(model, optimizer, precision, source, batch, ranks)
            mine = [loss, float(context.stop.requested)]
            total = ranks.reduce_sum(torch.tensor(mine, dtype=torch.float64, device=ranks.device))
            loss_sum, stops = total.tolist()
            if stops:
                raise Stopped(f"classifier: stopped at step {step}; the next attempt starts again")
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
    return net


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    source: TrainBatches,
    batch: Batch,
    ranks: Ranks,
) -> float:
    """Make one step on this rank's share; return its part of the global batch's summed loss, nats."""
    x, y, _ = source.to_device(batch, ranks.device, torch.float32)
    with precision.autocast():
        logits = model(x)
    loss = F.binary_cross_entropy_with_logits(logits.float(), y, reduction="sum")
    optimizer.zero_grad(set_to_none=True)
    # Shares may be unequal. W / N per image makes DDP's mean over W ranks the exact mean over the
    # global batch of N.
    precision.scaler.scale(loss * (ranks.world_size / source.batch_size)).backward()
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return float(loss.detach())


def predict(net: classifier.AttributeNet, shards: Shards, ranks: Ranks) -> np.ndarray:
    """Return float32 logits [N, A] of a whole split, on every rank (all ranks take part)."""

    def logits(indices: np.ndarray) -> dict[str, Tensor]:
        images, _ = shards.gather(indices)
        return {"logits": net(to_float(torch.from_numpy(images).to(ranks.device)))}

    return map_blocks(logits, len(shards), BLOCK, ranks)["logits"]

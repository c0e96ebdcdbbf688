"""The classifier stage: train the attribute classifier and fix its thresholds on val."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import ClassifierConfig, RunConfig
from pipeline.data.shards import Shards
from pipeline.data.staging import open_shards, staged
from pipeline.evaluation import classifier
from pipeline.evaluation.metrics.statistics import best_threshold
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.context import Context, alone
from pipeline.training.classify import files, supervised


def run(config: RunConfig, context: Context) -> None:
    """Train on every attribute and write the classifier's files (all ranks call it).

    metrics.json is written last. A finished classifier is left alone. An interrupted training
    starts again, which takes minutes. Raises Stopped on every rank after a stop signal.
    """
    folder = layout.classifier_dir(config)
    if is_there(folder, context):  # no lock: this user may not be able to write beside it
        return
    with alone(folder.with_suffix(".lock"), context):
        if not is_there(folder, context):  # another launch may have made it meanwhile
            make(folder, config, context)


def is_there(folder: Path, context: Context) -> bool:
    """Return whether the classifier is complete, one answer for all ranks, and say so."""
    there = "there" if (folder / "metrics.json").exists() else ""
    found = bool(context.ranks.text_from_main(there))
    if found:
        context.log.info("%s is already there", folder)
    return found


def make(folder: Path, config: RunConfig, context: Context) -> None:
    """Train the classifier and write its files (all ranks)."""
    ranks = context.ranks
    shards = staged(layout.shards_dir(config), config.data.stage_to, context.log, config.data.damaged)
    splits = {name: open_shards(shards, name, config.data) for name in ("train", "val", "test")}
    start = time.monotonic()
    net = train(config.classifier, splits["train"], splits["val"], context)
    logits = {name: supervised.predict(net, splits[name], ranks) for name in ("val", "test")}
    if ranks.is_main:
        scores = measure(logits, splits)
        files.save(folder, net, splits["train"].attribute_names, splits["train"].size)
        write_json(folder / "metrics.json", {**scores, "seconds": round(time.monotonic() - start, 1)})
        for name, values in scores.items():
            shown = [f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)]
            context.log.info("%s: %s", name, ", ".join(shown))
    ranks.barrier()  # no rank goes on before the files are there


def train(
    settings: ClassifierConfig, shards: Shards, val: Shards, context: Context
) -> classifier.AttributeNet:
    """Return a classifier trained on every attribute (all ranks call it); see `supervised.fit`."""
    torch.manual_seed(settings.seed)
    net = classifier.AttributeNet(len(shards.attribute_names)).to(context.ranks.device)
    supervised.fit(net, settings, shards, val, context)
    return net


def measure(logits: dict[str, np.ndarray], splits: dict[str, Shards]) -> dict[str, dict[str, Any]]:
    """Score the logits [N, A] of val and test.

    Thresholds come from val alone; test is only measured.
    """
    names = splits["val"].attribute_names
    labels = {name: splits[name].attributes().astype(bool) for name in logits}
    thresholds = [best_threshold(logits["val"][:, i], labels["val"][:, i]) for i in range(len(names))]
    fixed = np.array(thresholds)
    return {name: classifier.scores(logits[name], labels[name], fixed, names) for name in logits}

"""The eval stage: one checkpoint, judged on held-out images; numbers, pictures and the protocol go to eval/<n>/."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pipeline import layout
from pipeline.config import digest
from pipeline.data.shards import Shards
from pipeline.errors import CheckpointError
from pipeline.evaluation import classifier, pictures
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.features import extractors
from pipeline.evaluation.metrics import METRICS, collect
from pipeline.evaluation.reference import library_versions
from pipeline.evaluation.report import write_report
from pipeline.runtime.checkpoint import load_model
from pipeline.runtime.context import Context
from pipeline.runtime.files import write_json
from pipeline.runtime.preempt import Stopped
from pipeline.runtime.tracking import sync_run
from pipeline.schema import RunConfig


def run(config: RunConfig, context: Context) -> None:
    """Measure the checkpoint `eval.checkpoint` with every metric and write the next eval/<n>/ (all ranks call it).

    Raises CheckpointError where weights, classifier and shards do not fit together, Stopped after a stop signal:
    an evaluation that was cut off leaves no metrics.json, and the next one takes a new number.
    """
    ranks = context.ranks
    # Convolutions in TF32 would move features by more than two good models differ.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        evidence = gather_evidence(config, context)
        found: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for name, metric in METRICS.items():
            start = time.monotonic()
            stop_together(context)
            for part in metric.needs:  # computed by all ranks for the first metric that needs it, whose time it counts as
                getattr(evidence, part)
            if ranks.is_main:
                found |= dict(metric()(evidence))
                seconds[name] = round(time.monotonic() - start, 2)
                context.log.info("%s: %.1f s", name, seconds[name])
        if ranks.is_main:
            folder = next_folder(context.run_dir)
            pictures.draw(evidence, folder / "samples")
            results = {"protocol": protocol(config, evidence), **collect(found), "seconds": seconds}
            write_json(folder / "metrics.json", results)
            for name, value in results["metrics"].items():
                context.log.info("%s %s", name, value)
            context.log.info("report: %s", write_report(context.run_dir))
            sync_run(context.run_dir, context.log)  # on a cluster nobody else is left to tell MLflow
    ranks.barrier()  # no rank goes on before the files are there


def gather_evidence(config: RunConfig, context: Context) -> Evidence:
    """Load the model, the classifier and the images, and check that they belong together (every rank, the same files)."""
    device = context.ranks.device
    splits = {name: Shards(layout.shards_dir(config), name, config.data.verify) for name in ("train", "val", "test")}
    judge = classifier.load(layout.classifier_dir(config), device)
    model, info = load_model(context.run_dir, config.eval.checkpoint, config.eval.weights, device)
    shards = splits[config.eval.split]
    if info.size != shards.size or not set(info.attributes) <= set(shards.attribute_names):
        raise CheckpointError(
            f"{info.file}: trained on {info.size}-pixel images with attributes {', '.join(info.attributes)}; the shards in"
            f" {layout.shards_dir(config)} are of {shards.size} pixels with {', '.join(shards.attribute_names)}; train on these shards"
        )
    features = extractors(judge, config.eval.inception_weights, device)
    context.log.info("checkpoint of step %d (%s weights), %s split", info.step, config.eval.weights, config.eval.split)
    return Evidence(model, info, judge, features, config.eval, splits, context.ranks, layout.reference_dir(config), config.shard.crop)


def stop_together(context: Context) -> None:
    """Raise Stopped on every rank if any of them was asked to stop (all ranks take part)."""
    flag = torch.tensor([context.stop.requested], dtype=torch.float64, device=context.ranks.device)
    if context.ranks.reduce_sum(flag).item():
        raise Stopped("eval: stopped; it starts again")


def next_folder(run_dir: Path) -> Path:
    """Make the next free eval/<n> (rank 0 alone); two evaluations at a time get two folders."""
    number = max((int(p.name) for p in layout.eval_dirs(run_dir)), default=0) + 1
    while True:
        try:
            (folder := run_dir / "eval" / str(number)).mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def protocol(config: RunConfig, evidence: Evidence) -> dict[str, Any]:
    """Everything that a number depends on beside the weights: numbers of different protocols do not share a column."""
    settings, info = evidence.settings, evidence.info
    keys = [key for split in (settings.split, "train") for key in evidence.reference_keys(split)]
    return {
        "split": settings.split,
        "n": evidence.n,
        "train_n": len(evidence.positions("train")),
        "block": settings.block,
        "seed": settings.seed,
        "size": info.size,
        "crop": config.shard.crop,
        "weights": settings.weights,
        "step": info.step,
        "images": info.images,
        "checkpoint": info.file.name,
        "checkpoint_digest": info.digest,
        "classifier_digest": evidence.classifier.digest,
        "shards_digest": evidence.splits[settings.split].content_digest,
        "features": ",".join(extractor.metric for extractor in evidence.extractors),
        "features_digest": digest([extractor.digest for extractor in evidence.extractors]),
        "reference_digest": digest(keys),
        "reconstruction": "posterior mean",
        "rare_samples": settings.rare_samples,
        "iw_images": min(evidence.n, settings.iw_images),
        "iw_samples": settings.iw_samples,
        "device": evidence.ranks.device.type,
        **library_versions(),
    }

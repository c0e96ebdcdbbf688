"""The eval stage: judge a checkpoint on held-out images and write eval/<n>/."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config.load import digest
from pipeline.config.schema import RunConfig
from pipeline.config.suggest import suggest
from pipeline.data.annotations import read_annotations
from pipeline.data.sources.base import Annotations
from pipeline.data.staging import open_shards
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation import classifier
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.features import extractors
from pipeline.evaluation.metrics.base import Metric, collect
from pipeline.evaluation.metrics.distances import kernel_subset
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.parts import neighbour_features, reference_keys
from pipeline.evaluation.reference import library_versions
from pipeline.reporting import pictures
from pipeline.reporting.drawings import draw_latents, require_projection
from pipeline.reporting.report import write_report
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.blocks import Watch, stop_together
from pipeline.runtime.context import Context
from pipeline.training.checkpoints.store import Checkpoints
from pipeline.training.checkpoints.weights import load_model
from pipeline.training.phases import evaluated_phase


def run(config: RunConfig, context: Context) -> None:
    """Measure every checkpoint that `eval.checkpoint` names (all ranks call it).

    Raises ConfigError for an unknown metric, CheckpointError if weights, classifier and shards do
    not fit together, and Stopped after a stop signal. A stopped evaluation leaves no metrics.json,
    and the next one takes a new number.
    """
    metrics = chosen_metrics(config.eval.metrics)
    require_projection(config.eval.projection)
    # Convolutions in TF32 would move features by more than two good models differ.
    stage = evaluated_phase(config)
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exact:
        for checkpoint in checkpoints(context.run_dir, config.eval.checkpoint, stage):
            evaluate(config, gather_evidence(config, context, checkpoint), metrics, context)
    context.ranks.barrier()  # no rank goes on before the files are there


def evaluate(
    config: RunConfig, evidence: Evidence, metrics: dict[str, type[Metric]], context: Context
) -> None:
    """Make one evaluation: all ranks compute the evidence, rank 0 the numbers and files."""
    found: dict[str, Any] = {}
    groups: dict[str, str] = {}  # name of a number -> its metric
    seconds: dict[str, float] = {}
    for done, (name, metric) in enumerate(metrics.items(), 1):
        stop_together(context.stop, context.ranks)
        for part in metric.needs:
            with timed(seconds, f"images: {part}"):
                evidence.compute(part)  # all ranks, for the first metric that needs it
        if context.ranks.is_main:
            with timed(seconds, name):
                measured = dict(metric()(evidence))
            found |= measured
            groups |= dict.fromkeys(measured, name)
            took = "metrics %d/%d, %s took %.1f s"
            context.log.info(took, done, len(metrics), name, seconds[name])
    if not context.ranks.is_main:
        return
    with next_folder(context.run_dir) as folder:
        with timed(seconds, "pictures"):
            pictures.draw(evidence, folder / "samples")
        with timed(seconds, "drawings"):
            draw_latents(evidence, found.get("units", []), folder / "plots")
        seconds["gathering"] = evidence.watch.gathering_s
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        results = {"protocol": protocol(config, evidence), **collect(found, groups), "seconds": rounded}
        write_json(folder / "metrics.json", results)
    for name, value in results["metrics"].items():
        context.log.info("%s %s", name, value)
    context.log.info("report: %s", write_report(context.run_dir))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of the block to `seconds[name]`."""
    start = time.monotonic()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start


def chosen_metrics(names: list[str]) -> dict[str, type[Metric]]:
    """Return the metrics of these names; no names mean all.

    Raises ConfigError with the nearest name.
    """
    for name in names:
        if name not in METRICS:
            hint = suggest(name, METRICS)
            raise ConfigError(
                f"key 'eval.metrics': unknown metric {name!r}, expected some of {', '.join(METRICS)}{hint}"
            )
    return {name: METRICS[name] for name in METRICS if not names or name in names}


def checkpoints(run_dir: Path, which: str, stage: str) -> list[str]:
    """Return the names to give to `load_model`.

    For "all" these are the kept checkpoints that were validated, the best one last.
    """
    if which != "all":
        return [which]
    store = Checkpoints(layout.checkpoints_dir(run_dir, stage))
    best = store.best()
    if best is None:
        raise CheckpointError(f"{store.folder}: no checkpoint was validated yet; train further")
    validated = [step for step in store.steps() if step != best and store.read(step).meta["validation"]]
    return [str(step) for step in [*validated, best]]


def gather_evidence(config: RunConfig, context: Context, checkpoint: str) -> Evidence:
    """Load model, classifier and images, and check that they fit together (on every rank)."""
    device = context.ranks.device
    splits = {
        name: open_shards(layout.shards_dir(config), name, config.data) for name in ("train", "val", "test")
    }
    judge = classifier.load(layout.classifier_dir(config), device)
    model, info = load_model(context.run_dir, checkpoint, config.eval.weights, device, config.eval.stage)
    shards = splits[config.eval.split]
    if info.size != shards.size or not set(info.attributes) <= set(shards.attribute_names):
        raise CheckpointError(
            f"{info.file}: trained on {info.size}-pixel images with attributes {', '.join(info.attributes)};"
            f" the shards in {layout.shards_dir(config)} have {shards.size} pixels and"
            f" {', '.join(shards.attribute_names)}; train on these shards"
        )
    features = extractors(judge, config.eval, device)
    context.log.info(
        "checkpoint of step %d (%s weights), %s split", info.step, config.eval.weights, config.eval.split
    )
    return Evidence(
        model=model,
        info=info,
        classifier=judge,
        extractors=features,
        settings=config.eval,
        splits=splits,
        ranks=context.ranks,
        reference_dir=partial(layout.reference_dir, config),
        crop=shards.crop,
        annotations=all_annotations(config, shards.manifest, context),
        watch=Watch("blocks", context.stop),
    )


def all_annotations(config: RunConfig, manifest: dict[str, Any], context: Context) -> Annotations | None:
    """Read the labels of all annotated images, even of missing files.

    Only rank 0 reads them; other ranks get None. So does rank 0 if they are out of reach.
    """
    if not context.ranks.is_main:
        return None
    try:
        return read_annotations(layout.shards_dir(config), manifest, layout.source_path(config))
    except DataError as error:
        context.log.warning("rarity is counted only in the shards: %s", error)
        return None


@contextmanager
def next_folder(run_dir: Path) -> Iterator[Path]:
    """Make the next free eval/<n> (rank 0 only), and delete it again if the block fails.

    Two evaluations at the same time get two folders.
    """
    number = max((int(p.name) for p in layout.eval_dirs(run_dir)), default=0) + 1
    while True:
        folder = run_dir / "eval" / str(number)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a full disk gets its bytes back
        raise


def protocol(config: RunConfig, evidence: Evidence) -> dict[str, Any]:
    """Everything that a number depends on besides the weights.

    Only equal protocols are compared.
    """
    settings, info = evidence.settings, evidence.info
    left_out = [name for name in METRICS if settings.metrics and name not in settings.metrics]
    keys = [key for split in (settings.split, "train") for key in reference_keys(evidence, split)]
    return {
        "left_out": ",".join(left_out),
        "split": settings.split,
        "n": evidence.n,
        "train_n": len(evidence.positions("train")),
        "block": settings.block,
        "seed": settings.seed,
        "size": info.size,
        "crop": evidence.crop,
        "weights": settings.weights,
        "stage": evaluated_phase(config),
        "guidance": settings.guidance,
        "margin": settings.margin,
        "tries": settings.tries,
        "edit_strength": settings.edit_strength,
        "step": info.step,
        "images": info.images,
        "checkpoint": info.file.name,
        "checkpoint_digest": info.digest,
        "classifier_digest": evidence.classifier.digest,
        "shards_digest": evidence.splits[settings.split].content_digest,
        **_excluded(evidence),
        "features": ",".join(extractor.metric for extractor in evidence.extractors),
        "features_digest": digest([extractor.digest for extractor in evidence.extractors]),
        "reference_digest": digest(keys),
        "reconstruction": "posterior mean",
        "rare_samples": settings.rare_samples,
        "flip_images": min(evidence.n, settings.flip_images),
        "rarity_from": evidence.counts.n,  # annotated training images
        "neighbour_images": evidence.memory_n,
        "neighbour_features": neighbour_features(evidence).metric,
        "kid_subsets": settings.kid_subsets,
        "kid_subset_size": kernel_subset(settings.kid_subset_size, evidence.n),
        "iw_images": min(evidence.n, settings.iw_images),
        "iw_samples": settings.iw_samples,
        "device": evidence.ranks.device.type,
        **library_versions(),
    }


def _excluded(evidence: Evidence) -> dict[str, int]:
    """Return how many images of each split are left out because their tars are damaged; mostly nothing."""
    counts = {split: sum(shards.excluded.values()) for split, shards in evidence.splits.items()}
    return {f"excluded_{split}": n for split, n in counts.items() if n}

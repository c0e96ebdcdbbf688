"""Time of an evaluation: distances between features against making images and features."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from cvae.model import CVAE
from pipeline.config.schema import RunConfig
from pipeline.data.shards import Shards
from pipeline.evaluation import classifier
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.features import ClassifierFeatures
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.distributed import process_group
from pipeline.stages import eval as eval_stage
from pipeline.training.checkpoints.weights import CheckpointInfo
from pipeline.training.classify import files
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure
from tools.dev.benchmarks.stages import context, make_run

SAMPLES = 10_000
FULL_S = 3.0  # a shorter repetition takes fewer samples, for tests
DISTANCES = ("frechet", "kernel", "precision_recall")
IMAGES = ("real", "train", "mean_image", "reconstructions", "samples")


class Repeated(Shards):
    """A split of `n` images that starts again at the first image when the shards end.

    Distances on it mean nothing, but they cost as much as those of `n` different images.
    """

    def __init__(self, shards: Shards, n: int) -> None:
        self.__dict__.update(shards.__dict__)
        self.n = n
        self.wrapped = shards

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray, boxes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the images and attributes at these positions."""
        return self.wrapped.gather(indices % len(self.wrapped), boxes)

    def attributes(self) -> np.ndarray:
        """Return the attributes of all positions."""
        return self.wrapped.attributes()[np.arange(self.n) % len(self.wrapped)]


def save_untrained_classifier(config: RunConfig, val: Shards) -> None:
    """Save a classifier with random weights where the evaluation looks for it."""
    names = val.attribute_names
    folder = layout.classifier_dir(config)
    net = classifier.AttributeNet(len(names)).eval()
    files.save(folder, net, names, config.shard.size)
    probabilities = np.zeros((len(val), len(names)))
    thresholds = np.zeros(len(names))
    scores = classifier.scores(probabilities, val.attributes(), thresholds, list(names))
    write_json(folder / "metrics.json", {"val": scores})


def evaluation(bench: Bench) -> dict[str, Result]:
    """Measure the seconds of three metrics.

    Model and classifier are untrained, which does not change their speed.
    """
    n = max(50, round(SAMPLES * min(1.0, bench.seconds / FULL_S)))
    settings = replace(bench.config.eval, n=n, metrics=list(DISTANCES))
    config = replace(bench.config, eval=settings, tracking=replace(bench.config.tracking, enabled=False))
    shards = {name: Shards(layout.shards_dir(config), name) for name in ("train", "val", "test")}
    names = shards["test"].attribute_names
    torch.manual_seed(0)
    model = CVAE(config.model, config.shard.size, len(names)).eval()
    save_untrained_classifier(config, shards["val"])
    info = CheckpointInfo(0, 0, 1.0, 1.0, names, config.shard.size, {}, bench.folder / "none", "")
    rounds: list[dict[str, float]] = []

    with process_group(60, config.train.threads) as ranks:
        judge = classifier.load(layout.classifier_dir(config), ranks.device)
        features = ClassifierFeatures(judge, settings, ranks.device)

        def once() -> float:
            folder = make_run(bench.folder / f"evaluation{len(rounds)}", config)
            splits: dict[str, Shards] = {name: Repeated(split, n) for name, split in shards.items()}
            # A new reference each time, so that real images pass the network as often as samples.
            reference = folder / "reference"
            evidence = Evidence(
                model.to(ranks.device),
                info,
                judge,
                [features],
                settings,
                splits,
                ranks,
                reference.joinpath,
                shards["train"].crop,
            )
            metrics = {name: METRICS[name] for name in DISTANCES}
            with torch.no_grad():
                eval_stage.evaluate(config, evidence, metrics, context(folder, ranks))
            rounds.append(json.loads((folder / "eval/1/metrics.json").read_text())["seconds"])
            return sum(rounds[-1][f"images: {part}"] for part in IMAGES)

        def seconds_of_parts(*parts: str) -> float:
            return sum(rounds[-1][part] for part in parts)

        contenders: Contenders = {
            "generation and features": once,
            "distances and gathering": partial(seconds_of_parts, *DISTANCES, "gathering"),
        }
        contenders |= {name: partial(seconds_of_parts, name) for name in DISTANCES}
        measured = measure(contenders, bench.repeats)
    distances = measured["contenders"]["distances and gathering"]["values"]
    images = measured["contenders"]["generation and features"]["values"]
    share = max(one / other for one, other in zip(distances, images, strict=True))
    protocol = (
        f"{n} images of {config.shard.size} pixels, {config.name}, classifier features, 1 rank, "
        f"{torch.get_num_threads()} threads, device {ranks.device}. Generation and features: "
        f"{', '.join(IMAGES)}. Fréchet distances with jackknife and extrapolation, KID, precision, recall, "
        f"density, coverage and gathering together take at most {100 * share:.1f} % of that; the target is "
        "20 %."
    )
    return {"evaluation": {"title": "Evaluation", "unit": "s", "protocol": protocol, **measured}}

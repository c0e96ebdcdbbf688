"""Time of an evaluation: what distances between sets of features cost beside generating and looking at the images."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from cvae.model import CVAE
from pipeline.data.shards import Shards
from pipeline.evaluation import classifier
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.features import ClassifierFeatures
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.distributed import process_group
from pipeline.stages import eval as eval_stage
from pipeline.training.checkpoint import CheckpointInfo
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure
from tools.dev.benchmarks.stages import context, make_run

SAMPLES, FULL_S = 10_000, 3.0  # as many where a repetition may take this long or longer, fewer for tests
DISTANCES = ("frechet", "kernel", "precision_recall")
IMAGES = ("real", "train", "mean_image", "reconstructions", "samples")


class Repeated(Shards):
    """A split of `n` images that begins again where the shards end: its distances mean nothing, their cost is that of n images."""

    def __init__(self, shards: Shards, n: int) -> None:
        self.__dict__.update(shards.__dict__)
        self.n, self.wrapped = n, shards

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and attributes at these positions."""
        return self.wrapped.gather(indices % len(self.wrapped))

    def attributes(self) -> np.ndarray:
        """Of all positions."""
        return self.wrapped.attributes()[np.arange(self.n) % len(self.wrapped)]


def evaluation(bench: Bench) -> dict[str, Result]:
    """Seconds of three metrics with an untrained model and classifier: their speed does not depend on what they have learnt."""
    n = max(50, round(SAMPLES * min(1.0, bench.seconds / FULL_S)))
    settings = replace(bench.config.eval, n=n, metrics=list(DISTANCES))
    config = replace(bench.config, eval=settings, tracking=replace(bench.config.tracking, enabled=False))
    shards = {name: Shards(layout.shards_dir(config), name) for name in ("train", "val", "test")}
    names = shards["test"].attribute_names
    torch.manual_seed(0)
    model, judge_dir = CVAE(config.model, config.shard.size, len(names)).eval(), layout.classifier_dir(config)
    classifier.save(judge_dir, classifier.AttributeNet(len(names)).eval(), names, config.shard.size)
    decisions: Any = (
        np.zeros((len(shards["val"]), len(names))),
        shards["val"].attributes(),
        np.zeros(len(names)),
        names,
    )
    write_json(judge_dir / "metrics.json", {"val": classifier.scores(*decisions)})
    info = CheckpointInfo(0, 0, 1.0, 1.0, names, config.shard.size, bench.folder / "none", "")
    rounds: list[dict[str, float]] = []

    with process_group(60, config.train.threads) as ranks:
        judge = classifier.load(judge_dir, ranks.device)
        features = ClassifierFeatures(judge, settings, ranks.device)

        def once() -> float:
            folder = make_run(bench.folder / f"evaluation{len(rounds)}", config)
            splits: dict[str, Shards] = {name: Repeated(split, n) for name, split in shards.items()}
            reference = (
                folder / "reference"
            )  # a new one each time: real images are looked at as often as samples are
            evidence = Evidence(
                model.to(ranks.device),
                info,
                judge,
                [features],
                settings,
                splits,
                ranks,
                reference,
                config.shard.crop,
            )
            with torch.no_grad():
                eval_stage.evaluate(
                    config, evidence, {name: METRICS[name] for name in DISTANCES}, context(folder, ranks)
                )
            rounds.append(json.loads((folder / "eval/1/metrics.json").read_text())["seconds"])
            return sum(rounds[-1][f"images: {part}"] for part in IMAGES)

        def then(*parts: str) -> float:
            return sum(rounds[-1][part] for part in parts)

        contenders: Contenders = {
            "generation and features": once,
            "distances and gathering": partial(then, *DISTANCES, "gathering"),
        }
        contenders |= {name: partial(then, name) for name in DISTANCES}
        measured = measure(contenders, bench.repeats)
    both = [
        measured["contenders"][name]["values"]
        for name in ("distances and gathering", "generation and features")
    ]
    share = max(distances / images for distances, images in zip(*both, strict=True))
    protocol = (
        f"{n} images of {config.shard.size} pixels, {config.name}, classifier features, 1 rank, {torch.get_num_threads()} threads, device "
        f"{ranks.device}. Generation and features: {', '.join(IMAGES)}. Fréchet distances with jackknife and extrapolation, KID, "
        f"precision, recall, density, coverage and gathering together take at most {100 * share:.1f} % of that; aimed at: 20 %."
    )
    return {"evaluation": {"title": "Evaluation", "unit": "s", "protocol": protocol, **measured}}

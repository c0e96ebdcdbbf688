"""A model with known answers, a perfect judge of its images, and evidence from both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cvae.distributions import DiagonalGaussian, Distribution
from pipeline.config.schema import EvalConfig
from pipeline.data.shards import Shards
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric
from pipeline.rundir import layout
from pipeline.runtime.distributed import Ranks
from tests.tiny_run import ATTRIBUTES, SIZE, tiny_config


class Painter:
    """A model that paints what it is asked for (or always the same), in the cells of `tiny_images`."""

    z_dim, pixels = 4, 3 * SIZE * SIZE
    control = None

    def __init__(self, listens: bool) -> None:
        self.listens = listens

    def encode(self, x: torch.Tensor, y: torch.Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(x.flatten(1)[:, :4], torch.zeros(len(x), 4))

    def prior(self, y: torch.Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(torch.zeros(len(y), 4), torch.zeros(len(y), 4))

    def guided_prior(self, y: torch.Tensor, strength: float) -> Distribution:
        prior = self.prior(y)
        return prior if strength == 1.0 else prior.guided(prior, strength)

    def decode(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y if self.listens else torch.zeros_like(y)
        shown = torch.zeros(len(y), len(ATTRIBUTES))
        shown[:, READ] = y
        cells = shown.view(-1, 1, 2, 3).repeat_interleave(16, 2).repeat_interleave(11, 3)[..., :SIZE]
        return (cells * 120 + 60).expand(-1, 3, -1, -1) / 127.5 - 1


READ = [3, 2, 5]  # the model reads Male, Heavy_Makeup, Young, in this order


class Cells:
    """Features: mean brightness of every cell; a perfect judge of these images."""

    metric, digest = "fd_classifier", "cells"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().mean(-1)
        return torch.stack(
            [
                x[:, 16 * r : 16 * r + 16, 11 * c : 11 * c + 10].mean((1, 2))
                for r in range(2)
                for c in range(3)
            ],
            1,
        )


def evidence(runs: Path, listens: bool = True, **overrides: Any) -> Evidence:
    """Evidence of a Painter before the perfect judge; no part is computed yet."""
    config = tiny_config(runs)
    splits = {name: Shards(layout.shards_dir(config), name) for name in ("train", "val", "test")}
    judge = SimpleNamespace(
        attributes=ATTRIBUTES, digest="cells", decide=lambda x: x > 120, judge=lambda x: (x, x > 120)
    )
    info = SimpleNamespace(attributes=[ATTRIBUTES[i] for i in READ], s2=0.25, s2_fit=0.2)
    settings = dataclasses.replace(config.eval, **overrides)
    painter: Any = Painter(listens)
    folder = (runs / "reference").joinpath
    given: Any = (painter, info, judge, [Cells()], settings, splits, Ranks(), folder, 148)
    return Evidence(*given)


def measure(metric: type[Metric], own: Evidence) -> dict[str, Any]:
    """Compute what a metric needs, and then the metric."""
    own.compute(*metric.needs)
    return dict(metric()(own))


def given(parts: dict[str, dict[str, np.ndarray]], requested: np.ndarray | None = None) -> Evidence:
    """Evidence whose parts are given, of a model that reads as many attributes as `requested` has columns."""
    names = [f"attribute {i}" for i in range(0 if requested is None else requested.shape[1])]
    info: Any = SimpleNamespace(attributes=names)
    own = Evidence(
        model=Painter(listens=True),  # type: ignore[arg-type]
        info=info,
        classifier=SimpleNamespace(),  # type: ignore[arg-type]
        extractors=[],
        settings=EvalConfig(),
        splits={},
        ranks=Ranks(),
        reference_dir=Path().joinpath,
        crop=1,
        parts=parts,
    )
    own.__dict__["requested"] = requested
    return own

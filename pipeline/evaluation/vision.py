"""The one import of torchvision and torch-fidelity, which also works where torch has no GPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@functools.cache  # also keeps the library: its definitions would die with it
def _torchvision() -> torch.library.Library | None:
    """Import torchvision, or raise its own error.

    PyPI's torchvision is compiled for CUDA. A CPU-only torch cannot load its binary part, and torchvision then fails on the
    missing operators `nms` and `qnms`, which nothing here uses. Declaring their signatures lets all that is written in
    Python (models, transforms) work; calling the two would still fail, and so would torchvision.io.
    A torchvision built for this torch imports at once, and nothing is declared.
    """
    try:
        import torchvision

        return None
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # left half-imported by the failure
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return operators


def transforms() -> Any:
    """The module torchvision.transforms."""
    _torchvision()
    from torchvision import transforms

    return transforms


def resnet18(norm_layer: Callable[[int], nn.Module]) -> Any:
    """torchvision's ResNet-18, untrained, with `norm_layer` for its normalisations and no last layer: images -> [B, 512]."""
    _torchvision()
    from torchvision.models import resnet18 as build

    net = build(norm_layer=norm_layer)
    net.fc = nn.Identity()
    return net


def inception(weights: Any) -> Any:
    """The Inception network of 2015 from torch-fidelity, with `weights` (a file object): uint8 [B, 3, H, W] -> ([B, 2048],)."""
    _torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)

"""The independent judge: an ImageNet network that never takes part in training.

Distances on features that training used flatter a model. EfficientNet-Lite2 comes as two pip packages
(the extra `judge`), so it needs no internet on a compute node. Its weights are verified by digest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.extras import JUDGE_WEIGHTS
from pipeline.errors import DataError

WEIGHTS_FILE = "models/efficientnet-lite2-9656183e.pth"
WEIGHTS_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
SIZE = 224  # pixels; a 64-pixel face is enlarged


def load_judge() -> nn.Module:
    """EfficientNet-Lite2 with its ImageNet weights, frozen, in eval mode.

    Raises DataError if the weights are not the published ones. The network's normalisations use their
    stored statistics, so an image's features do not depend on its neighbours.
    """
    package = importlib.util.find_spec(JUDGE_WEIGHTS)
    assert package is not None and package.submodule_search_locations, "call only where it is installed"
    file = Path(package.submodule_search_locations[0]) / WEIGHTS_FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; reinstall {JUDGE_WEIGHTS.replace('_', '-')}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise DataError(
            f"{file}: sha256 {digest[:12]}, expected {WEIGHTS_SHA256[:12]}: not the published weights of"
            f" EfficientNet-Lite2; reinstall {JUDGE_WEIGHTS.replace('_', '-')}"
        )
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite2")
    net.load_state_dict(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"))
    return net.eval().requires_grad_(False)


def judge_input(images: Tensor) -> Tensor:
    """Enlarge uint8 [B, S, S, 3] bicubically to float [B, 3, 224, 224], and scale to (x - 127) / 128."""
    x = images.permute(0, 3, 1, 2).float()
    return (F.interpolate(x, (SIZE, SIZE), mode="bicubic", align_corners=False) - 127) / 128


def judge_features(net: nn.Module, images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> pooled features float32 [B, 1280]."""
    x = judge_input(images).contiguous(memory_format=torch.channels_last)
    return net.extract_features(x).mean((2, 3)).float()  # type: ignore[operator]

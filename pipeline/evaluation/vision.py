"""The only import of torchvision and torch-fidelity. It also works with a CPU-only torch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from pipeline.config.suggest import suggest
from pipeline.errors import ConfigError, DataError

SLOW_TO_INITIALISE = ("inception_v3", "googlenet")  # their random weights take seconds and are replaced


@functools.cache  # keeps the library alive, and with it the definitions
def _torchvision() -> torch.library.Library | None:
    """Import torchvision, or raise its error.

    PyPI's torchvision is compiled for CUDA. A CPU-only torch cannot load its binary part, and
    torchvision fails on the missing operators `nms` and `qnms`, which nothing here uses. Once their
    signatures are declared, everything written in Python works (models, transforms). The two
    operators and torchvision.io still fail. A torchvision built for this torch imports at once, and
    nothing is declared.
    """
    try:
        import torchvision

        return None
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::nms" not in str(error):
            raise
        half_imported = [name for name in sys.modules if name.split(".")[0] == "torchvision"]
        for name in half_imported:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return operators


def transforms() -> Any:
    """Return the module torchvision.transforms."""
    _torchvision()
    from torchvision import transforms

    return transforms


def resnet18(norm_layer: Callable[[int], nn.Module]) -> Any:
    """Make torchvision's ResNet-18 without its last layer: images -> [B, 512]."""
    _torchvision()
    from torchvision.models import resnet18 as build

    net = build(norm_layer=norm_layer)
    net.fc = nn.Identity()
    return net


def inception(weights: Any) -> Any:
    """Make torch-fidelity's Inception network: uint8 [B, 3, H, W] -> ([B, 2048],).

    Each normalisation is folded into its convolution, and the weights are in channels-last order. The
    features differ from torch-fidelity's in rounding only.
    """
    _torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    blocks = [module for module in net.modules() if isinstance(module, BasicConv2d)]
    for block in blocks:
        block.conv = torch.nn.utils.fuse_conv_bn_eval(block.conv, block.bn)
        block.bn = nn.Identity()
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def network(name: str, weights: bytes) -> nn.Module:
    """Make torchvision's architecture `name` without its last layer: images -> features.

    Raises ConfigError for an unknown name, DataError if the weights are not of this architecture.
    """
    _torchvision()
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        hint = suggest(name, known) or "; one that it has is 'resnet50'"
        raise ConfigError(f"key 'eval.network_name': torchvision has no architecture {name!r}{hint}")
    try:
        state = safetensors.torch.load(weights)
        options = {"init_weights": False} if name in SLOW_TO_INITIALISE else {}
        net = models.get_model(name, weights=None, **options)
        last = next(part for part in ("fc", "classifier", "heads", "head") if hasattr(net, part))
        state = {key: value for key, value in state.items() if not key.startswith(f"{last}.")}
        setattr(net, last, nn.Identity())
        net.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"key 'eval.network': not safetensors weights of torchvision's {name}: {reason}"
        ) from None
    return net


def imagenet_input(images: torch.Tensor, size: int) -> torch.Tensor:
    """Prepare uint8 images [B, S, S, 3] as for ImageNet -> float [B, 3, size, size]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    x = nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    mean = x.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = x.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (x - mean) / deviation

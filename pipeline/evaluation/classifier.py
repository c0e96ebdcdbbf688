"""The attribute classifier: ResNet-18 with GroupNorm, one logit per attribute, and 512 features before them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.evaluation import vision
from pipeline.evaluation.metrics.statistics import average_precision, balanced_accuracy
from pipeline.rundir.files import write_bytes, write_json


class AttributeNet(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> logits [B, A].

    GroupNorm, because BatchNorm would make an image's score depend on its neighbours and the gradient on the number of ranks.
    """

    def __init__(self, n_attributes: int) -> None:
        """Random weights; `n_attributes` logits."""
        super().__init__()
        self.body = vision.resnet18(norm_layer=partial(nn.GroupNorm, 32))
        self.head = nn.Linear(512, n_attributes)

    def features(self, x: Tensor) -> Tensor:
        """Average-pooled features [B, 512]."""
        # GroupNorm is slow on channels-last memory: plain NCHW is 1.2 (fp32) to 1.4 (bf16) times faster on a CPU.
        return self.body(2 * x.contiguous())  # about unit variance

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, A]."""
        return self.head(self.features(x))


@dataclass(frozen=True)
class Classifier:
    """A trained AttributeNet and the decisions that were fixed on the validation split."""

    net: AttributeNet
    attributes: list[str]
    size: int  # pixels of the images it was trained on
    digest: str  # sha256 of its weights
    thresholds: np.ndarray  # [A]: a logit above it says yes

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logits [N, A] in float64 of features [N, 512]."""
        weight, bias = (p.detach().double().cpu().numpy() for p in (self.net.head.weight, self.net.head.bias))
        return features.astype(np.float64) @ weight.T + bias

    def judge(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and whether each attribute is there, float64 and bool [N, A], from features [N, 512]."""
        logits = self.logits(features)
        return logits, logits > self.thresholds

    def decide(self, features: np.ndarray) -> np.ndarray:
        """Whether each attribute is there, bool [N, A], from features [N, 512]."""
        return self.judge(features)[1]


def save(folder: Path, net: AttributeNet, attributes: list[str], size: int) -> None:
    """Write model.safetensors and model.json."""
    weights = safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    )
    meta = {"attributes": attributes, "size": size, "digest": hashlib.sha256(weights).hexdigest()}
    write_bytes(folder / "model.safetensors", weights)
    write_json(folder / "model.json", meta)


def load(folder: Path, device: torch.device) -> Classifier:
    """Read what `save` and the classifier stage wrote.

    Raises CheckpointError where a file is missing or the weights are not those that model.json describes.
    """
    try:
        meta, scores = (json.loads((folder / name).read_text()) for name in ("model.json", "metrics.json"))
        weights = (folder / "model.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: not there; run the `classifier` stage of this configuration first"
        ) from None
    if (found := hashlib.sha256(weights).hexdigest()) != meta["digest"]:
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: damaged: sha256 {found[:12]}..., expected {meta['digest'][:12]}...;"
            f" delete {folder} and run the `classifier` stage again"
        )
    net = AttributeNet(len(meta["attributes"]))
    net.load_state_dict(safetensors.torch.load(weights))
    net.to(device).eval().requires_grad_(False)
    thresholds = np.array([scores["val"]["per_attribute"][name]["threshold"] for name in meta["attributes"]])
    return Classifier(net, meta["attributes"], meta["size"], meta["digest"], thresholds)


def scores(
    logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, attributes: list[str]
) -> dict[str, Any]:
    """Accuracy at probability 0.5, balanced accuracy at `thresholds`, average precision: means over attributes and each one's own.

    logits and labels [N, A]. An attribute that is always or never there in the split has no balanced accuracy (null).
    """
    accuracy = ((logits > 0) == labels).mean(0)
    balanced = balanced_accuracy(logits > thresholds, labels)
    precision = np.array([average_precision(*columns) for columns in zip(logits.T, labels.T, strict=True)])
    columns = {
        "accuracy": accuracy,
        "balanced_accuracy": balanced,
        "ap": precision,
        "positive": labels.mean(0),
        "threshold": thresholds,
    }
    each = {
        name: {
            column: None if np.isnan(values[i]) else float(values[i]) for column, values in columns.items()
        }
        for i, name in enumerate(attributes)
    }
    means = {column: float(np.nanmean(columns[column])) for column in ("accuracy", "balanced_accuracy", "ap")}
    return {**means, "n": len(labels), "per_attribute": each}

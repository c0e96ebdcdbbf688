"""What turns images into features for Frechet distances. A new one is a class here and its line in FEATURES."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.loader import to_float
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import vision
from pipeline.evaluation.classifier import Classifier

INCEPTION_SHA256 = "6726825d"  # how the sha256 of the official file begins; its name says so


class Features(Protocol):
    """uint8 images [B, S, S, 3] -> features [B, F]."""

    metric: str  # how distances between these features are called
    digest: str  # of the weights: features are the same if and only if this is

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [B, F] of uint8 images [B, S, S, 3]."""


class ClassifierFeatures:
    """The 512 pooled features of the attribute classifier."""

    metric = "fd_classifier"

    def __init__(self, classifier: Classifier, weights: str, device: torch.device) -> None:
        """`classifier` is all it needs."""
        self.classifier, self.digest, self.device = classifier, classifier.digest, device

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, 512]."""
        return self.classifier.net.features(to_float(images.to(self.device)))


class InceptionFeatures:
    """The 2048 pool features of the Inception network by which FID is defined; only the official weights are accepted."""

    metric = "fid_inception"

    def __init__(self, classifier: Classifier, weights: str, device: torch.device) -> None:
        """Read the file `weights`. Raises ConfigError where it is missing, DataError where it is not the official file."""
        try:
            content = Path(weights).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"key 'eval.inception_weights': {weights}: {error.strerror}; leave it empty to go without") from None
        self.digest, self.device = hashlib.sha256(content).hexdigest(), device
        if not self.digest.startswith(INCEPTION_SHA256):
            raise DataError(
                f"{weights}: sha256 begins {self.digest[:8]}, expected {INCEPTION_SHA256}: not the official file"
                " weights-inception-2015-12-05-6726825d.pth, and a distance with other weights is not the FID"
            )
        # torch-fidelity unpickles what it is given, and 32 bits of a digest are not beyond forging: it gets a file of our own
        # making, with nothing but the tensors that the safe loader found.
        clean = io.BytesIO()
        torch.save(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"), clean)
        clean.seek(0)
        self.net = vision.inception(clean).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, 2048]; resized to 299 pixels as in TensorFlow 1."""
        return self.net(images.to(self.device).permute(0, 3, 1, 2))[0]


FEATURES: dict[str, type[ClassifierFeatures] | type[InceptionFeatures]] = {"classifier": ClassifierFeatures, "inception": InceptionFeatures}


def extractors(classifier: Classifier, inception_weights: str, device: torch.device) -> list[Features]:
    """The classifier's features, and Inception's where its weights are given."""
    names = ["classifier", "inception"] if inception_weights else ["classifier"]
    return [FEATURES[name](classifier, inception_weights, device) for name in names]

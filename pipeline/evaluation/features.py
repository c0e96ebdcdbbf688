"""What turns images into features for distances between sets of images. A new one is a class here and its line in FEATURES."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.config.schema import EvalConfig
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

    def __init__(self, classifier: Classifier, settings: EvalConfig, device: torch.device) -> None:
        """`classifier` is all it needs."""
        self.classifier, self.digest, self.device = classifier, classifier.digest, device

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, 512]."""
        return self.classifier.net.features(to_float(images.to(self.device)))


class InceptionFeatures:
    """The 2048 pool features of the Inception network by which FID is defined; only the official weights are accepted."""

    metric = "fid_inception"

    def __init__(self, classifier: Classifier, settings: EvalConfig, device: torch.device) -> None:
        """Read the file `eval.inception_weights`. Raises ConfigError where it is missing, DataError where it is not the official file."""
        weights = settings.inception_weights
        content = _read("eval.inception_weights", weights)
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


class NetworkFeatures:
    """The output of a network of the user's: safetensors of a torchvision architecture, or TorchScript.

    A safetensors file holds numbers alone. TorchScript is a program, some of which runs when it is loaded and which may open files
    (aten::from_file): it is loaded only if `eval.network_sha256` names exactly these bytes, so that somebody vouched for them.
    """

    def __init__(self, classifier: Classifier, settings: EvalConfig, device: torch.device) -> None:
        """Read the file `eval.network`. Raises ConfigError or DataError where file, architecture and digest do not fit together."""
        content = _read("eval.network", settings.network)
        self.digest, self.device, self.size = (
            hashlib.sha256(content).hexdigest(),
            device,
            settings.network_size,
        )
        if settings.network_sha256 and settings.network_sha256 != self.digest:
            raise DataError(
                f"{settings.network}: sha256 {self.digest}, but key 'eval.network_sha256' expects {settings.network_sha256}"
            )
        if settings.network_name:
            net = vision.network(settings.network_name, content)
            self.metric = f"fd_{settings.network_name}"
        elif settings.network_sha256:
            net = torch.jit.load(io.BytesIO(content), map_location="cpu")  # vouched for: see above
            self.metric = "fd_network"
        else:
            raise ConfigError(
                f"key 'eval.network': {settings.network} is taken for TorchScript, which is a program: if you trust it, say so with"
                f" eval.network_sha256={self.digest}; for a .safetensors of a torchvision architecture set eval.network_name"
            )
        self.digest = hashlib.sha256(
            f"{self.digest} {settings.network_name} {self.size}".encode()
        ).hexdigest()
        self.net = net.to(device).eval()

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, F]; images are resized and normalised as for ImageNet."""
        features = self.net(vision.imagenet_input(images.to(self.device), self.size)).flatten(1).float()
        return features


FEATURES: dict[str, type[ClassifierFeatures] | type[InceptionFeatures] | type[NetworkFeatures]] = {
    "classifier": ClassifierFeatures,
    "inception": InceptionFeatures,
    "network": NetworkFeatures,
}


def extractors(classifier: Classifier, settings: EvalConfig, device: torch.device) -> list[Features]:
    """The classifier's features, and those whose weights the configuration names."""
    wanted = {
        "classifier": True,
        "inception": bool(settings.inception_weights),
        "network": bool(settings.network),
    }
    return [FEATURES[name](classifier, settings, device) for name, there in wanted.items() if there]


def _read(key: str, file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"key '{key}': {file}: {error.strerror}; `tools/fetch_weights.py` fetches Inception's; empty: go without"
        ) from None

"""Networks that turn images into features for distances between sets of images.

New features are a class and its line in FEATURES.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.config.extras import JUDGE_CODE, JUDGE_WEIGHTS, installed
from pipeline.config.schema import EvalConfig
from pipeline.data.loader import to_float
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import judge, vision
from pipeline.evaluation.classifier import Classifier

INCEPTION_SHA256 = "6726825d"  # how the sha256 of the official file begins; its name says so


class Features(Protocol):
    """A map from uint8 images [B, S, S, 3] to features [B, F]."""

    metric: str  # name of distances between these features
    digest: str  # identifies the weights: equal digests give equal features

    def __call__(self, images: Tensor) -> Tensor:
        """Return features float32 [B, F] of uint8 images [B, S, S, 3]."""


class ClassifierFeatures:
    """The 512 pooled features of the attribute classifier."""

    metric = "fd_classifier"

    def __init__(self, classifier: Classifier, settings: EvalConfig, device: torch.device) -> None:
        """Use the network of `classifier`."""
        self.classifier, self.digest, self.device = classifier, classifier.digest, device

    @staticmethod
    def wanted(settings: EvalConfig) -> bool:
        """Always: attributes are read from these features."""
        return True

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, 512]."""
        return self.classifier.net.features(to_float(images.to(self.device)))


class InceptionFeatures:
    """The 2048 pool features of the Inception network that defines the FID.

    It accepts only the official weights.
    """

    metric = "fid_inception"

    def __init__(self, classifier: Classifier, settings: EvalConfig, device: torch.device) -> None:
        """Read `eval.inception_weights`.

        Raises ConfigError for a missing file, DataError for an unofficial one.
        """
        weights = settings.inception_weights
        content = _read("eval.inception_weights", weights)
        self.digest, self.device = hashlib.sha256(content).hexdigest(), device
        if not self.digest.startswith(INCEPTION_SHA256):
            raise DataError(
                f"{weights}: sha256 begins {self.digest[:8]}, expected {INCEPTION_SHA256}: this is not the"
                " official file weights-inception-2015-12-05-6726825d.pth, and a distance with other weights"
                " is not the FID"
            )
        # torch-fidelity unpickles its file, and somebody could forge 32 bits of a digest. So it
        # gets a file that we write ourselves from the tensors that the safe loader found.
        clean = io.BytesIO()
        torch.save(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"), clean)
        clean.seek(0)
        self.net = vision.inception(clean).to(device)

    @staticmethod
    def wanted(settings: EvalConfig) -> bool:
        """Whether the configuration names the weights."""
        return bool(settings.inception_weights)

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, 2048]; images are resized to 299 pixels as in TensorFlow 1."""
        return self.net(images.to(self.device).permute(0, 3, 1, 2))[0]


class NetworkFeatures:
    """The user's own network: safetensors of a torchvision architecture, or TorchScript.

    A safetensors file holds only numbers. TorchScript is a program: parts of it run when it is
    loaded, and it may open files (aten::from_file). It is loaded only if `eval.network_sha256`
    names exactly these bytes, so that somebody vouched for them.
    """

    def __init__(self, classifier: Classifier, settings: EvalConfig, device: torch.device) -> None:
        """Read `eval.network`.

        Raises ConfigError or DataError if file, architecture and digest disagree.
        """
        content = _read("eval.network", settings.network)
        digest = hashlib.sha256(content).hexdigest()
        if settings.network_sha256 and settings.network_sha256 != digest:
            raise DataError(
                f"{settings.network}: sha256 {digest}, but key 'eval.network_sha256' expects"
                f" {settings.network_sha256}"
            )
        if settings.network_name:
            net = vision.network(settings.network_name, content)
            self.metric = f"fd_{settings.network_name}"
        elif settings.network_sha256:
            net = torch.jit.load(io.BytesIO(content), map_location="cpu")  # vouched for: see the class
            self.metric = "fd_network"
        else:
            raise ConfigError(
                f"key 'eval.network': {settings.network} is read as TorchScript, which is a program: if you"
                f" trust it, say so with eval.network_sha256={digest}; for safetensors of a torchvision"
                " architecture set eval.network_name"
            )
        self.device, self.size = device, settings.network_size
        identity = f"{digest} {settings.network_name} {self.size}"
        self.digest = hashlib.sha256(identity.encode()).hexdigest()
        self.net = net.to(device).eval()

    @staticmethod
    def wanted(settings: EvalConfig) -> bool:
        """Whether the configuration names a network."""
        return bool(settings.network)

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, F]; images are resized and normalised as for ImageNet."""
        return self.net(vision.imagenet_input(images.to(self.device), self.size)).flatten(1).float()


class JudgeFeatures:
    """The 1,280 pooled features of EfficientNet-Lite2, which no training uses; see judge.py."""

    metric = "fd_efficientnet_lite2"
    digest = judge.WEIGHTS_SHA256

    def __init__(self, classifier: Classifier, settings: EvalConfig, device: torch.device) -> None:
        """Load the network of the extra `judge`. Raises DataError if its weights are not those published."""
        self.device = device
        self.net = judge.load_judge().to(device)

    @staticmethod
    def wanted(settings: EvalConfig) -> bool:
        """Whether the configuration wants the judge and the extra `judge` is installed."""
        return settings.judge and installed(JUDGE_CODE, JUDGE_WEIGHTS)

    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, 1280]."""
        return judge.judge_features(self.net, images.to(self.device))


FEATURES = (ClassifierFeatures, JudgeFeatures, InceptionFeatures, NetworkFeatures)


def extractors(classifier: Classifier, settings: EvalConfig, device: torch.device) -> list[Features]:
    """Return the classifier's features and those whose weights the configuration names."""
    return [kind(classifier, settings, device) for kind in FEATURES if kind.wanted(settings)]


def _read(key: str, file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"key '{key}': {file}: {error.strerror}; `tools/fetch_weights.py` fetches the Inception weights,"
            " and an empty value does without them"
        ) from None

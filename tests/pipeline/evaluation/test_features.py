"""Networks of features: only official, known or vouched-for weights are loaded."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.schema import EvalConfig
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import features as features_module
from pipeline.evaluation import vision
from pipeline.evaluation.features import InceptionFeatures, NetworkFeatures, extractors

CPU, JUDGE = torch.device("cpu"), SimpleNamespace(digest="judge")
IMAGES = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def features(**settings: Any) -> NetworkFeatures:
    return NetworkFeatures(JUDGE, EvalConfig(network_size=64, **settings), CPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torchvision's resnet18."""
    vision._torchvision()
    from torchvision import models

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    safetensors.torch.save_file(models.get_model("resnet18", weights=None).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "net.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())).save(str(file))
    return file


def test_weights_of_a_known_architecture_give_what_comes_before_its_last_layer(resnet: Path) -> None:
    own = features(network=str(resnet), network_name="resnet18")
    assert (
        own.metric == "fd_resnet18" and own(IMAGES).shape == (3, 512) and own(IMAGES).dtype == torch.float32
    )
    larger = NetworkFeatures(
        JUDGE, EvalConfig(network=str(resnet), network_name="resnet18", network_size=96), CPU
    )  # type: ignore[arg-type]
    assert (
        own.digest == features(network=str(resnet), network_name="resnet18").digest != larger.digest
    )  # never one cache entry


def test_weights_of_another_architecture_and_unknown_names_are_refused(resnet: Path, script: Path) -> None:
    with pytest.raises(DataError, match="not safetensors weights of torchvision's resnet50"):
        features(network=str(resnet), network_name="resnet50")
    with pytest.raises(DataError, match="not safetensors weights"):
        features(network=str(script), network_name="resnet18")
    with pytest.raises(ConfigError, match="no architecture 'resnet81'; did you mean .*resnet18"):
        features(network=str(resnet), network_name="resnet81")


def test_a_program_is_loaded_only_where_somebody_vouched_for_its_very_bytes(script: Path) -> None:
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    with pytest.raises(
        ConfigError, match=f"is a program: if you trust it, say so with eval.network_sha256={digest}"
    ):
        features(network=str(script))
    with pytest.raises(DataError, match="expects 00"):
        features(network=str(script), network_sha256="00")
    assert features(network=str(script), network_sha256=digest)(IMAGES).shape == (3, 3 * 4 * 4)


def test_inception_features_only_from_the_official_file(
    inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="expected 6726825d"):
        settings = EvalConfig(inception_weights=str(inception_file))
        InceptionFeatures(JUDGE, settings, CPU)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eval.inception_weights.*No such file"):
        settings = EvalConfig(inception_weights="/nowhere/weights.pth")
        InceptionFeatures(JUDGE, settings, CPU)  # type: ignore[arg-type]
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest[:8])
    settings = EvalConfig(inception_weights=str(inception_file))
    extractor = InceptionFeatures(JUDGE, settings, CPU)  # type: ignore[arg-type]
    images = IMAGES[:2]
    rows = extractor(images)
    assert rows.shape == (2, 2048) and rows.dtype == torch.float32 and extractor.digest == digest
    assert torch.equal(rows, vision.inception(inception_file)(images.permute(0, 3, 1, 2))[0])
    assert extractor.metric == "fid_inception"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.file,)


def test_code_in_a_weights_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": Bomb(tmp_path / "exploded")}, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest[:8])
    with pytest.raises(pickle.UnpicklingError):
        InceptionFeatures(
            SimpleNamespace(),
            EvalConfig(inception_weights=str(tmp_path / "weights.pth")),
            torch.device("cpu"),
        )  # type: ignore[arg-type]
    assert not (tmp_path / "exploded").exists()


def test_only_features_that_the_configuration_names_are_made(resnet: Path) -> None:
    alone = extractors(JUDGE, EvalConfig(judge=False), CPU)  # type: ignore[arg-type]
    assert [extractor.metric for extractor in alone] == ["fd_classifier"]
    settings = EvalConfig(judge=False, network=str(resnet), network_name="resnet18")
    both = extractors(JUDGE, settings, CPU)  # type: ignore[arg-type]
    assert [extractor.metric for extractor in both] == ["fd_classifier", "fd_resnet18"]

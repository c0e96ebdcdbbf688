"""Networks of features that a user brings: numbers alone, or a program that somebody has vouched for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.schema import EvalConfig
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import vision
from pipeline.evaluation.features import NetworkFeatures

CPU, JUDGE = torch.device("cpu"), SimpleNamespace()
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

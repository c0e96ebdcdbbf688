"""torch-fidelity's command line gives the eval stage's values on exported PNGs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.schema import EvalConfig
from pipeline.evaluation import features as features_module
from pipeline.evaluation.features import InceptionFeatures
from pipeline.evaluation.metrics.distances import FrechetDistance, KernelDistance, PrecisionRecall
from tests.conftest import ROOT
from tests.pipeline.evaluation.painter import given

pytestmark = pytest.mark.slow  # 96 forward passes of Inception on one thread: minutes
N = 24
COMMAND = """
from pipeline.evaluation import vision
vision._torchvision()
from torch_fidelity.fidelity import main
main()
"""


def images(seed: int, contrast: float) -> np.ndarray:
    """Smooth random pictures uint8 [N, 64, 64, 3]."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(128, 40 * contrast, (N, 3, 6, 6)))
    fine = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")
    return fine.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def export(pictures: np.ndarray, folder: Path) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:05d}.png")
    return folder


def test_our_values_are_those_of_the_command_line(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"samples": images(0, 1.0), "real": images(1, 1.3)}
    monkeypatch.setattr(
        features_module, "INCEPTION_SHA256", hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8]
    )
    settings = EvalConfig(inception_weights=str(inception_file), kid_subsets=20, kid_subset_size=16)
    extract = InceptionFeatures(SimpleNamespace(), settings, torch.device("cpu"))  # type: ignore[arg-type]
    with torch.no_grad():
        rows = {
            name: torch.cat([extract(part) for part in torch.from_numpy(x).split(12)]).numpy()
            for name, x in sets.items()
        }
    rows |= {"reconstructions": rows["samples"], "mean_image": rows["real"][:1]}
    rows |= dict.fromkeys(("train", "others"), rows["real"])
    evidence = given({part: {"fid_inception": features} for part, features in rows.items()})
    evidence = dataclasses.replace(evidence, settings=settings)
    ours: dict[str, Any] = {}
    for metric in (FrechetDistance, KernelDistance, PrecisionRecall):
        ours |= dict(metric()(evidence))

    paths = [
        "--input1",
        export(sets["samples"], tmp_path / "samples"),
        "--input2",
        export(sets["real"], tmp_path / "real"),
        "--batch-size",
        12,
    ]
    how = [
        "--cpu",
        "--json",
        "--silent",
        "--no-samples-shuffle",
        "--no-cache",
        "--feature-extractor-weights-path",
        inception_file,
    ]
    what = [
        "--fid",
        "--kid",
        "--kid-subsets",
        20,
        "--kid-subset-size",
        16,
        "--prc",
        "--feature-extractor",
        "inception-v3-compat",
    ]
    command = [sys.executable, "-c", COMMAND, *map(str, [*paths, *how, *what, "--feature-layer-prc", "2048"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout[done.stdout.index("{") :])
    # Our Inception has its normalisations folded in, and torch-fidelity's KID is in float32.
    assert ours["fid_inception_samples"].value == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-4
    )
    assert ours["kid_inception_samples"].value == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-3
    )
    assert ours["precision_inception"].value == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall_inception"].value == pytest.approx(theirs["recall"], rel=1e-6)

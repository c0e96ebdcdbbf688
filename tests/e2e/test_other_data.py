"""A data set that is not faces goes through the whole chain: images and a CSV to a report."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pipeline.config import load as configuration
from pipeline.data.sources.toy.shapes import ATTRIBUTES, make_toy_shapes
from tests.conftest import ROOT, run_stage_here

# What only a data set of faces has.
FACES = re.compile(r"\bfaces?\b|celeb|smil|\bmale\b|eyeglass|makeup|hair|portrait|photo", re.IGNORECASE)
TINY = (
    "shard.size=16",
    "model.net.channels=[8,16]",
    "model.z_dim=8",
    "model.prior.flow.layers=2",
    "train.images=128",
    "train.batch_size=32",
    "train.threads=1",
    "classifier.epochs=1",
    "eval.n=16",
    "eval.judge=false",
    "eval.flip_images=2",
    "eval.block=16",
    "eval.iw_images=4",
    "eval.iw_samples=2",
    "eval.rare_samples=8",
    "tracking.enabled=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 240 shapes with five attributes, every stage in this process."""
    folder = tmp_path_factory.mktemp("shapes")
    make_toy_shapes(folder / "data", 240)
    places = [f"runs_dir={folder / 'runs'}", f"shard.source={folder / 'data'}"]
    config = configuration.load([ROOT / "configs/sigma_cvae_nf.yaml"], [*places, *TINY])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})  # no worker processes
        for stage in ("shard", "train", "classifier", "eval"):
            run_stage_here(config, folder / "runs" / "shapes", stage)
    return folder / "runs" / "shapes"


def test_the_report_speaks_of_the_data_set_not_of_faces(run: Path) -> None:
    report = (run / "report.html").read_text()
    words = re.sub(r'(src|href)="data:[^"]*"|<style.*?</style>|<script.*?</script>', "", report, flags=re.S)
    words = re.sub(r"<[^>]+>", " ", words)
    assert not FACES.search(words), FACES.search(words)
    assert "N = 16, 16 px (crop of the largest square)" in words
    for name in ATTRIBUTES:
        assert name in words
    names = [file.name for file in (run / "eval" / "1").rglob("*")]
    assert names and not [name for name in names if FACES.search(name)]

"""The cache of reference features: what hits, what misses, what is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.shards import Shards
from pipeline.errors import DataError
from pipeline.evaluation.reference import reference_features, reference_key
from pipeline.rundir import layout
from pipeline.runtime.distributed import Ranks
from tests.pipeline.evaluation.painter import Cells
from tests.tiny_run import make_shards, tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with shards."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(tiny_config(folder))
    return folder


def test_reference_cache_is_hit_only_by_the_same_images_and_features(runs: Path, tmp_path: Path) -> None:
    shards = Shards(layout.shards_dir(tiny_config(runs)), "test")
    calls = []

    class Counting(Cells):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            return super().__call__(images)

    def ask(n: int = 20, crop: int = 148, digest: str = "a", content: str = "", block: int = 8) -> np.ndarray:
        extractor, given = Counting(), shards
        extractor.digest = digest
        if content:
            given = Shards.__new__(Shards)
            given.__dict__.update(shards.__dict__ | {"content_digest": content})
        calls.clear()
        key = reference_key(given, "test", n, block, extractor, crop)
        return reference_features(tmp_path.joinpath, given, key, extractor, Ranks())

    first = ask()
    assert calls == [8, 8, 4]
    assert np.array_equal(ask(), first) and not calls
    for change in ({"n": 16}, {"crop": 140}, {"digest": "b"}, {"content": "0" * 64}, {"block": 10}):
        ask(**change)  # type: ignore[arg-type]
        assert calls, change
    file = next(tmp_path.glob("*/features.safetensors"))
    for file in tmp_path.glob("*/features.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match="features.safetensors: damaged.*delete it"):
        ask()

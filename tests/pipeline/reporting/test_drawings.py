"""Projections of latent vectors: reproducible, true to far groups, and named if their package is missing."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from pipeline.config.limits import CHOICES
from pipeline.errors import ConfigError
from pipeline.reporting.drawings import PROJECTIONS, require_projection


@pytest.mark.parametrize("name", PROJECTIONS)
def test_two_far_groups_stay_apart_and_a_seed_draws_one_map(name: str) -> None:
    if name == "umap" and importlib.util.find_spec("umap") is None:
        pytest.skip("umap-learn is not installed: pip install -e '.[umap]'")
    z = np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32)
    z[60:] += 20
    points = PROJECTIONS[name](z, 0)
    assert points.shape == (120, 2)
    centres = points[:60].mean(0), points[60:].mean(0)
    spread = max(
        np.linalg.norm(half - centre, axis=1).max()
        for half, centre in zip((points[:60], points[60:]), centres, strict=True)
    )
    assert np.linalg.norm(centres[0] - centres[1]) > spread
    assert np.array_equal(points, PROJECTIONS[name](z, 0))


def test_every_projection_can_be_asked_for_and_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(CHOICES["eval.projection"]) == PROJECTIONS.keys()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_projection("tsne")
    with pytest.raises(ConfigError, match=r"eval.projection.*umap-learn.*pip install -e '\.\[umap\]'"):
        require_projection("umap")

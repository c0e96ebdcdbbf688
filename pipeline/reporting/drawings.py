"""Drawings of the latent space of one evaluation, as SVG; rank 0 makes them alone."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.evaluation.evidence import Evidence
from pipeline.reporting.plots import scatter, unit_curves
from pipeline.rundir.files import write_bytes

POINTS = 150  # of each coloured group, drawn and encoded
PERPLEXITY = 30.0


def draw_latents(evidence: Evidence, units: list[dict[str, Any]], folder: Path) -> None:
    """Write tsne.svg or umap.svg (drawn and encoded z on one map) and units.svg to `folder`.

    A drawing is left out if its metric was not measured or there are too few images.
    """
    if units:
        write_bytes(folder / "units.svg", unit_curves(units))
    if "latents" not in evidence or len(evidence.info.attributes) < 2:
        return
    groups = coloured_groups(evidence)
    rows = np.concatenate(list(groups.values()))
    if len(rows) <= PERPLEXITY:
        return
    latents, settings = evidence["latents"], evidence.settings
    z = np.concatenate([latents["drawn"][rows], latents["encoded"][rows]])
    points = PROJECTIONS[settings.projection](z, settings.seed)
    colours: dict[str, np.ndarray] = {}
    start = 0
    for name, members in groups.items():
        colours[name] = np.arange(start, start + len(members))
        start += len(members)
    halves = {"z drawn from p(z|y)": points[: len(rows)], "z encoded from images": points[len(rows) :]}
    write_bytes(folder / f"{settings.projection}.svg", scatter(halves, colours))


def coloured_groups(evidence: Evidence) -> dict[str, np.ndarray]:
    """Sort images by two attributes into four groups, the first POINTS images of each.

    The data set names the two. If the model does not read both, its first two attributes are used.
    """
    names = evidence.info.attributes
    pair = evidence.dataset.contrast
    if len(pair) != 2 or not set(pair) <= set(names):
        pair = tuple(names[:2])
    bits = evidence.requested[:, [names.index(name) for name in pair]].astype(bool)
    groups: dict[str, np.ndarray] = {}
    for values in product((True, False), repeat=2):
        words = [name if value else f"not {name}" for name, value in zip(pair, values, strict=True)]
        members = np.flatnonzero((bits == values).all(1))
        groups[", ".join(words)] = members[:POINTS]
    return groups


def tsne(z: np.ndarray, seed: int) -> np.ndarray:
    """Map z [N, D] to two dimensions [N, 2] by t-SNE (van der Maaten and Hinton, JMLR 9, 2008)."""
    from sklearn.manifold import TSNE

    return TSNE(2, perplexity=PERPLEXITY, init="pca", random_state=seed).fit_transform(z)


def umap(z: np.ndarray, seed: int) -> np.ndarray:
    """Map z [N, D] to two dimensions [N, 2] by UMAP (arXiv 1802.03426)."""
    from umap import UMAP

    return UMAP(random_state=seed, n_jobs=1).fit_transform(z)


PROJECTIONS = {"tsne": tsne, "umap": umap}


def require_projection(name: str) -> None:
    """Raise ConfigError if the package of this projection is not installed."""
    if name == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError(
            "key 'eval.projection': umap needs the package umap-learn, which is not installed;"
            " pip install -e '.[umap]'"
        )

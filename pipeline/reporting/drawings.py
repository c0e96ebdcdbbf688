"""Drawings of the latent space of one evaluation, as SVG; rank 0 alone makes them."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path

import numpy as np

from pipeline.errors import ConfigError
from pipeline.evaluation.evidence import Evidence
from pipeline.reporting.plots import scatter, unit_curves
from pipeline.rundir.files import write_bytes

PAIR = ("Male", "Smiling")  # coloured where the model reads both, else its first two attributes
POINTS = 150  # of each of the four combinations, drawn and encoded
PERPLEXITY = 30.0


def draw_latents(evidence: Evidence, units: list[dict], folder: Path) -> None:
    """Write tsne.svg or umap.svg (drawn and encoded z on one map) and units.svg to `folder`, as far as their metrics were measured."""
    if units:
        write_bytes(folder / "units.svg", unit_curves(units))
    groups = combinations(evidence) if evidence.has("latents") and len(evidence.info.attributes) > 1 else {}
    rows = np.concatenate([*groups.values(), np.zeros(0, int)])
    if len(rows) > PERPLEXITY:
        z = np.concatenate([evidence.latents["drawn"][rows], evidence.latents["encoded"][rows]])
        name = evidence.settings.projection
        points = PROJECTIONS[name](z, evidence.settings.seed)
        ends = np.cumsum([len(members) for members in groups.values()])
        parts = {
            name: np.arange(end - len(members), end)
            for (name, members), end in zip(groups.items(), ends, strict=True)
        }
        halves = {"z drawn from p(z|y)": points[: len(rows)], "z encoded from images": points[len(rows) :]}
        write_bytes(folder / f"{name}.svg", scatter(halves, parts))


def combinations(evidence: Evidence) -> dict[str, np.ndarray]:
    """The four combinations of two attributes -> the first POINTS images that carry each."""
    names = evidence.info.attributes
    pair = PAIR if set(PAIR) <= set(names) else tuple(names[:2])
    bits = evidence.requested[:, [names.index(name) for name in pair]].astype(bool)
    return {
        ", ".join(
            name if there else f"not {name}" for name, there in zip(pair, both, strict=True)
        ): np.flatnonzero((bits == both).all(1))[:POINTS]
        for both in product((True, False), repeat=2)
    }


def tsne(z: np.ndarray, seed: int) -> np.ndarray:
    """z [N, D] in two dimensions [N, 2] by t-SNE (van der Maaten and Hinton, JMLR 9, 2008)."""
    from sklearn.manifold import TSNE

    return TSNE(2, perplexity=PERPLEXITY, init="pca", random_state=seed).fit_transform(z)


def umap(z: np.ndarray, seed: int) -> np.ndarray:
    """z [N, D] in two dimensions [N, 2] by UMAP (arXiv 1802.03426)."""
    from umap import UMAP

    return UMAP(random_state=seed, n_jobs=1).fit_transform(z)


PROJECTIONS = {"tsne": tsne, "umap": umap}


def require_projection(name: str) -> None:
    """Raise ConfigError where the package of this projection is not installed."""
    if name == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError(
            "key 'eval.projection': umap needs the package umap-learn, which is not installed; pip install -e '.[umap]'"
        )

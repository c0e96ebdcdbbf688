"""Grids of images as PNG files; rank 0 alone draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.pixels import to_uint8
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.neighbours import nearest
from pipeline.evaluation.rare import FIGURE_5
from pipeline.reporting.grids import grid, labelled
from pipeline.runtime.split import spread

COLUMNS, ROWS = 8, 8  # images
SWEEP_STEPS = 8  # pictures from one end to the other
SWEPT = (
    "Smiling",
    "Male",
    "Eyeglasses",
    "Blond_Hair",
    "Young",
    "Heavy_Makeup",
    "Bald",
    "Pale_Skin",
)  # where the model reads them


@torch.no_grad()
def draw(evidence: Evidence, folder: Path) -> None:
    """Write samples, reconstructions, combinations, sweeps, interpolations, neighbours and extremes as PNG files to `folder`.

    Those that need a part of the evidence which no metric asked for are left out: it would take all ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = np.arange(min(evidence.n, COLUMNS * ROWS))
    grid(_triples(evidence, first[: COLUMNS * ROWS // 2]), COLUMNS).save(folder / "reconstructions.png")
    grid(_levels(evidence.draw("samples", first, evidence.requested[first])), COLUMNS).save(
        folder / "samples.png"
    )
    labelled(_sweeps(evidence)).save(folder / "one_attribute.png")
    grid(_interpolations(evidence), SWEEP_STEPS).save(folder / "interpolation.png")
    for case in FIGURE_5:
        if set(case) <= set(evidence.info.attributes):
            _figure_5(evidence, case).save(folder / f"{'_'.join(case).lower()}.png")
    if evidence.has("combinations") and evidence.combinations:
        rare = [
            (" + ".join(c.attributes), _combination(evidence, c.attributes, COLUMNS))
            for c in evidence.combinations
        ]
        labelled(rare).save(folder / "rare.png")
    if evidence.has("memory", "samples"):
        _draw_neighbours(evidence, folder)
    if evidence.has("reconstructions"):
        _draw_extremes(evidence, folder)


def _levels(x: torch.Tensor) -> np.ndarray:
    return to_uint8(x).cpu().numpy()


def _triples(evidence: Evidence, indices: np.ndarray) -> np.ndarray:
    """Strips of three rows of COLUMNS: real images, reconstructions, differences (black: none), white behind the last, [n, S, S, 3]."""
    real, decoded = evidence.reconstruct(indices)[:2]
    kinds = np.stack([_levels(x) for x in (real, decoded, (decoded - real).abs() - 1)])  # [3, n, S, S, 3]
    kinds = np.pad(kinds, ((0, 0), (0, -len(indices) % COLUMNS), (0, 0), (0, 0), (0, 0)), constant_values=255)
    return kinds.reshape(3, -1, COLUMNS, *kinds.shape[2:]).swapaxes(0, 1).reshape(-1, *kinds.shape[2:])


def _combination(evidence: Evidence, attributes: tuple[str, ...], n: int) -> np.ndarray:
    """`n` samples [n, S, S, 3] that are asked for all of the attributes."""
    return _levels(
        evidence.draw("rare/" + "+".join(attributes), np.arange(n), evidence.requests(attributes, n))
    )


def _figure_5(evidence: Evidence, case: tuple[str, ...]) -> Image.Image:
    """Samples of one of the paper's own combinations beside how many images carry it: too few for a ceiling."""
    counts = evidence.counts.of(tuple(map(evidence.info.attributes.index, case)))
    words = [
        " + ".join(case),
        f"{counts.train_count} training images",
        f"{counts.held_out_count} held out",
        "",
    ]
    images = _combination(evidence, case, COLUMNS * len(words))
    return labelled([(word, images[i * COLUMNS : (i + 1) * COLUMNS]) for i, word in enumerate(words)])


def _draw_neighbours(evidence: Evidence, folder: Path) -> None:
    """neighbours.png: above, the samples closest to any training image; below, that image."""
    (metric, memory), *_ = evidence.memory.items()
    distance, image = (x[:, 0] for x in nearest(evidence.samples[metric], memory, 1))
    closest = np.argsort(distance, kind="stable")[:COLUMNS]
    shards = evidence.splits["train"]
    positions = spread(evidence.memory_n, len(shards))[image[closest]]
    samples = _levels(evidence.draw("samples", closest, evidence.requested[closest]))
    grid(np.concatenate([samples, shards.gather(positions)[0]]), len(closest)).save(folder / "neighbours.png")


def _sweeps(evidence: Evidence) -> list[tuple[str, np.ndarray]]:
    """Rows of the same noise, in which one attribute that is asked for goes from 0 to 1, in prior and decoder: [SWEEP_STEPS, S, S, 3]."""
    names = [name for name in SWEPT if name in evidence.info.attributes] or evidence.info.attributes[:1]
    rows = []
    for number, name in enumerate(names):
        y = evidence.condition(np.repeat(evidence.requested[[number % evidence.n]], SWEEP_STEPS, 0))
        y[:, evidence.info.attributes.index(name)] = torch.linspace(
            0, 1, SWEEP_STEPS, dtype=y.dtype, device=y.device
        )
        noise = evidence.noise("samples", np.array([number])).expand(SWEEP_STEPS, -1)
        rows.append((name, _levels(evidence.model.decode(evidence.model.prior(y).sample(noise), y))))
    return rows


def _interpolations(evidence: Evidence) -> np.ndarray:
    """Rows from one encoded image to another through latent space, each decoded with the attributes of its nearer end."""
    rows = []
    for first in range(0, min(evidence.n - evidence.n % 2, 2 * ROWS), 2):
        ends = np.array([first, first + 1])
        mean = evidence.reconstruct(ends)[2].mean
        t = torch.linspace(0, 1, SWEEP_STEPS, dtype=mean.dtype, device=mean.device)[:, None]
        y = evidence.condition(evidence.requested[ends])[(t[:, 0] > 0.5).long()]
        rows.append(_levels(evidence.model.decode((1 - t) * mean[:1] + t * mean[1:], y)))
    return np.concatenate(rows)


def _draw_extremes(evidence: Evidence, folder: Path) -> None:
    """best.png and worst.png: the images with the smallest and largest error, their reconstructions, and the difference."""
    order = np.argsort(evidence.reconstructions["mse"], kind="stable")
    for name, chosen in (("best", order[:COLUMNS]), ("worst", order[::-1][:COLUMNS])):
        grid(_triples(evidence, np.ascontiguousarray(chosen)), COLUMNS).save(folder / f"{name}.png")

"""Grids of images as PNG files; rank 0 draws them alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.grids import grid, labelled, save_png
from pipeline.data.pixels import to_uint8
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.neighbours import nearest
from pipeline.runtime.split import ceil_div, spread

COLUMNS, ROWS = 8, 8  # images
SWEEP_STEPS = 8  # pictures from one end to the other
SWEEPS = 8  # attributes, if the data set names none that the model reads


@torch.no_grad()
def draw(evidence: Evidence, folder: Path) -> None:
    """Write the pictures of an evaluation as PNG files to `folder`.

    They show samples, reconstructions, rare combinations, sweeps, interpolations, neighbours and
    extremes. A picture is left out if its part of the evidence was not computed, because only all
    ranks together could compute it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = np.arange(min(evidence.n, COLUMNS * ROWS))
    save_png(grid(_triples(evidence, first[: COLUMNS * ROWS // 2]), COLUMNS), folder / "reconstructions.png")
    samples = _levels(evidence.draw("samples", first, evidence.requested[first]))
    save_png(grid(samples, COLUMNS), folder / "samples.png")
    labelled(_sweeps(evidence)).save(folder / "one_attribute.png")
    if evidence.n > 1:
        save_png(grid(_interpolations(evidence), SWEEP_STEPS), folder / "interpolation.png")
    for case in evidence.showcase:
        save_png(_showcase(evidence, case), folder / f"{'_'.join(case).lower()}.png")
    if "rare" in evidence:
        _draw_rare(evidence, folder)
    if "memory" in evidence and "samples" in evidence:
        _draw_neighbours(evidence, folder)
    if "reconstructions" in evidence:
        _draw_extremes(evidence, folder)


def _levels(x: torch.Tensor) -> np.ndarray:
    return to_uint8(x).cpu().numpy()


def _triples(evidence: Evidence, indices: np.ndarray) -> np.ndarray:
    """Strips of three rows: real images, reconstructions, and differences (black for none).

    The last strip is filled up with white -> [n, S, S, 3].
    """
    real, decoded, _ = evidence.reconstruct(indices)
    difference = (decoded - real).abs() - 1
    kinds = np.stack([_levels(real), _levels(decoded), _levels(difference)])  # [3, n, S, S, 3]
    strips = ceil_div(len(indices), COLUMNS)
    missing = strips * COLUMNS - len(indices)
    kinds = np.pad(kinds, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255)
    shape = kinds.shape[2:]
    by_strip = kinds.reshape(3, strips, COLUMNS, *shape).swapaxes(0, 1)
    return by_strip.reshape(-1, *shape)


def _combination(evidence: Evidence, attributes: tuple[str, ...], n: int) -> np.ndarray:
    """Draw `n` samples [n, S, S, 3] that are asked for all of `attributes`."""
    requests = evidence.requests(attributes, n)
    return _levels(evidence.draw("rare/" + "+".join(attributes), np.arange(n), requests))


def _draw_rare(evidence: Evidence, folder: Path) -> None:
    """Write rare.png: a labelled row of samples for each rare combination."""
    rows = []
    for combination in evidence.rare_combinations():
        attributes = combination.attributes
        rows.append((" + ".join(attributes), _combination(evidence, attributes, COLUMNS)))
    if rows:
        save_png(labelled(rows), folder / "rare.png")


def _showcase(evidence: Evidence, case: tuple[str, ...]) -> Image.Image:
    """Samples of one of the paper's own combinations, beside the number of images that carry it."""
    columns = tuple(evidence.info.attributes.index(name) for name in case)
    counts = evidence.counts.of(columns)
    labels = [
        " + ".join(case),
        f"{counts.train_count} training images",
        f"{counts.held_out_count} held out",
        "",
    ]
    images = _combination(evidence, case, COLUMNS * len(labels))
    rows = np.split(images, len(labels))
    return labelled(list(zip(labels, rows, strict=True)))


def _draw_neighbours(evidence: Evidence, folder: Path) -> None:
    """Write neighbours.png: the samples closest to any training image, and below each that image."""
    ((metric, memory),) = evidence["memory"].items()
    distances, indices = nearest(evidence["samples"][metric], memory, 1)
    closest = np.argsort(distances[:, 0], kind="stable")[:COLUMNS]
    shards = evidence.splits["train"]
    positions = spread(evidence.memory_n, len(shards))[indices[closest, 0]]
    originals, _ = shards.gather(positions)
    samples = _levels(evidence.draw("samples", closest, evidence.requested[closest]))
    save_png(grid(np.concatenate([samples, originals]), len(closest)), folder / "neighbours.png")


def _sweeps(evidence: Evidence) -> list[tuple[str, np.ndarray]]:
    """Rows of the same noise, in which one requested attribute goes from 0 to 1."""
    read = evidence.info.attributes
    names = [name for name in evidence.dataset.swept if name in read] or read[:SWEEPS]
    rows = []
    for number, name in enumerate(names):
        request = evidence.requested[[number % evidence.n]]
        y = evidence.condition(np.repeat(request, SWEEP_STEPS, 0))
        y[:, read.index(name)] = torch.linspace(0, 1, SWEEP_STEPS, dtype=y.dtype, device=y.device)
        noise = evidence.noise("samples", np.array([number])).expand(SWEEP_STEPS, -1)
        z = evidence.model.prior(y).sample(noise)
        rows.append((name, _levels(evidence.model.decode(z, y))))
    return rows


def _interpolations(evidence: Evidence) -> np.ndarray:
    """Rows from one encoded image to another, each decoded with the attributes of its nearer end."""
    rows = []
    pairs = min(evidence.n // 2, ROWS)
    for first in range(0, 2 * pairs, 2):
        ends = np.array([first, first + 1])
        mean = evidence.reconstruct(ends)[2].mean
        t = torch.linspace(0, 1, SWEEP_STEPS, dtype=mean.dtype, device=mean.device)[:, None]
        nearer = (t[:, 0] > 0.5).long()
        y = evidence.condition(evidence.requested[ends])[nearer]
        rows.append(_levels(evidence.model.decode((1 - t) * mean[:1] + t * mean[1:], y)))
    return np.concatenate(rows)


def _draw_extremes(evidence: Evidence, folder: Path) -> None:
    """Write best.png and worst.png: the images with the smallest and the largest error."""
    order = np.argsort(evidence["reconstructions"]["mse"], kind="stable")
    for name, chosen in (("best", order[:COLUMNS]), ("worst", order[::-1][:COLUMNS])):
        save_png(grid(_triples(evidence, np.ascontiguousarray(chosen)), COLUMNS), folder / f"{name}.png")

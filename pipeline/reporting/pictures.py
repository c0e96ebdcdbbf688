"""Grids of images as PNG files, and what their rows show; rank 0 draws them alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.grids import GAP, grid, save_png
from pipeline.data.pixels import to_uint8
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.neighbours import nearest
from pipeline.evaluation.parts import MOST_TOGGLED
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.split import ceil_div, spread

COLUMNS, ROWS = 8, 8  # images
SWEEP_STEPS = 8  # pictures from one end to the other
SHOWCASE_ROWS = 4
SWEEPS = 8  # attributes, if the data set names none that the model reads


@dataclass(frozen=True)
class Picture:
    """Images of a grid [n, S, S, 3], row by row, and what they show."""

    name: str  # of the file, without .png
    title: str
    caption: str
    images: np.ndarray
    labels: list[str] = field(default_factory=list)  # one for each row of stacks
    stack: int = 1  # rows that belong together: column k of each shows the same face
    columns: int = COLUMNS

    def contents(self) -> dict[str, Any]:
        """What a page needs to cut the grid into faces with labels."""
        words = {"title": self.title, "caption": self.caption, "labels": self.labels}
        shape = {"side": self.images.shape[1], "gap": GAP, "columns": self.columns, "stack": self.stack}
        return words | shape | {"count": len(self.images)}


@torch.no_grad()
def draw(evidence: Evidence, folder: Path) -> None:
    """Write the pictures of an evaluation as PNG files to `folder`, and their contents beside them.

    A picture is left out if its part of the evidence was not computed, because only all ranks
    together could compute it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for picture in _pictures(evidence):
        save_png(grid(picture.images, picture.columns), folder / f"{picture.name}.png")
        contents[picture.name] = picture.contents()
    write_json(folder / layout.PICTURES, contents)


def _pictures(evidence: Evidence) -> Iterator[Picture]:
    """All pictures, in the order in which a page shows them."""
    first = np.arange(min(evidence.n, COLUMNS * ROWS))
    samples = _levels(evidence.draw("samples", first, evidence.requested[first]))
    yield Picture("samples", "Samples", "Each was asked for the attributes of one held-out image.", samples)
    yield _sweeps(evidence)
    if "flips" in evidence:
        yield from _flips(evidence)
    if "rare" in evidence:
        yield from _rare(evidence)
    for case in evidence.showcase:
        yield _showcase(evidence, case)
    yield Picture(
        "reconstructions",
        "Reconstructions",
        "A held-out image, its reconstruction, and their difference (black for none).",
        _triples(evidence, first[: COLUMNS * ROWS // 2]),
        stack=3,
    )
    if "reconstructions" in evidence:
        yield from _extremes(evidence)
    if evidence.n > 1:
        yield _interpolations(evidence)
    if "memory" in evidence and "samples" in evidence:
        yield _neighbours(evidence)


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
    return _levels(evidence.draw_named(attributes, np.arange(n), requests))


def _flips(evidence: Evidence) -> Iterator[Picture]:
    """One picture with a row for each attribute that the metric `attribute_flip` toggles."""
    names = evidence.info.attributes
    n = min(COLUMNS, evidence.n)
    chosen = np.arange(n)
    asked = evidence.requested[chosen]
    before = _levels(evidence.flip(chosen, asked, asked))
    rows, labels = [], []
    for k in evidence.frequent(MOST_TOGGLED):
        wanted = asked.copy()
        wanted[:, k] ^= 1
        rows += [before, _levels(evidence.flip(chosen, asked, wanted))]
        labels.append(names[k])
    if rows:
        caption = "Above: as asked for. Below: the same noise with this one attribute toggled."
        images = np.concatenate(rows)
        yield Picture("attribute_flip", "One attribute toggled", caption, images, labels, stack=2, columns=n)


def _rare(evidence: Evidence) -> Iterator[Picture]:
    """A row of samples for each rare combination, if there is one."""
    rows, labels = [], []
    for combination in evidence.rare_combinations():
        labels.append(" + ".join(combination.attributes))
        rows.append(_combination(evidence, combination.attributes, COLUMNS))
    if rows:
        caption = "Samples that were asked for attributes which rarely occur together."
        yield Picture("rare", "Rare combinations", caption, np.concatenate(rows), labels)


def _showcase(evidence: Evidence, case: tuple[str, ...]) -> Picture:
    """Samples of one of the paper's own combinations, and the number of images that carry it."""
    columns = tuple(evidence.info.attributes.index(name) for name in case)
    counts = evidence.counts.of(columns)
    images = _combination(evidence, case, COLUMNS * SHOWCASE_ROWS)
    caption = f"{counts.train_count} training images and {counts.held_out_count} held out carry them."
    return Picture("_".join(case).lower(), " + ".join(case), caption, images)


def _neighbours(evidence: Evidence) -> Picture:
    """The samples that are closest to any training image, and below each that image."""
    ((metric, memory),) = evidence["memory"].items()
    distances, indices = nearest(evidence["samples"][metric], memory, 1)
    closest = np.argsort(distances[:, 0], kind="stable")[:COLUMNS]
    shards = evidence.splits["train"]
    positions = spread(evidence.memory_n, len(shards))[indices[closest, 0]]
    originals, _ = shards.gather(positions)
    samples = _levels(evidence.draw("samples", closest, evidence.requested[closest]))
    caption = "The samples that come closest to a training image, and below each that image."
    images = np.concatenate([samples, originals])
    return Picture("neighbours", "Nearest training images", caption, images, stack=2, columns=len(closest))


def _sweeps(evidence: Evidence) -> Picture:
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
        rows.append(_levels(evidence.model.decode(z, y)))
    caption = "The same noise, while one attribute goes from absent to present."
    images = np.concatenate(rows)
    return Picture("one_attribute", "One attribute at a time", caption, images, list(names))


def _interpolations(evidence: Evidence) -> Picture:
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
    caption = "From one encoded image to another; the attributes are those of the nearer end."
    return Picture("interpolation", "Interpolations", caption, np.concatenate(rows))


def _extremes(evidence: Evidence) -> Iterator[Picture]:
    """The images with the smallest and the largest error."""
    order = np.argsort(evidence["reconstructions"]["mse"], kind="stable")
    for name, chosen in (("best", order[:COLUMNS]), ("worst", order[::-1][:COLUMNS])):
        images = _triples(evidence, np.ascontiguousarray(chosen))
        title = f"{name.capitalize()} reconstructions"
        yield Picture(name, title, "Image, reconstruction, difference.", images, stack=3)

"""The model under test, its judges and the images, with the work on single images.

Nothing here communicates except `map`. Noise is keyed by image, so no row depends on the number of
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvae.anomaly import draw_again
from cvae.attributes import UNKNOWN
from cvae.distributions import DiagonalGaussian, Distribution
from cvae.losses import squared_error
from cvae.model import CVAE
from pipeline.config.schema import EvalConfig
from pipeline.data.loader import attribute_positions, to_float
from pipeline.data.pixels import to_uint8
from pipeline.data.shards import Shards
from pipeline.data.sources.base import Annotations, DatasetInfo
from pipeline.errors import ConfigError
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.features import Features
from pipeline.evaluation.rare import Counts, purpose_of, requests
from pipeline.runtime.blocks import Watch, map_blocks
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.keyed import keyed_normal
from pipeline.runtime.split import spread
from pipeline.training.checkpoints.weights import CheckpointInfo

Rows = dict[str, np.ndarray]  # named arrays, one row per image; features are named after their metric


@dataclass(frozen=True)
class Subject:
    """The model, judges and images of an evaluation. `splits` holds train, val and test."""

    model: CVAE
    info: CheckpointInfo
    classifier: Classifier
    extractors: list[Features]
    settings: EvalConfig
    splits: dict[str, Shards]
    ranks: Ranks
    reference_dir: Callable[[str], Path]  # from the digest of a key to the folder of its features
    crop: int  # pixels of the stored crop; part of the key of cached features
    annotations: Annotations | None = None  # of the whole dataset; rank 0 has them if they are at hand
    watch: Watch = field(default_factory=lambda: Watch("blocks"))

    @property
    def n(self) -> int:
        """Number of images measured."""
        return min(self.settings.n, len(self.splits[self.settings.split]))

    @property
    def dataset(self) -> DatasetInfo:
        """The facts about the data set in the shards' manifest."""
        return self.splits["train"].info

    @property
    def showcase(self) -> list[tuple[str, ...]]:
        """The data set's showcase combinations of which the model reads every attribute."""
        read = set(self.info.attributes)
        return [case for case in self.dataset.showcase if set(case) <= read]

    @property
    def memory_n(self) -> int:
        """Number of training images among which copies are searched."""
        return min(self.settings.neighbour_images, len(self.splits["train"]))

    @property
    def read_columns(self) -> list[int]:
        """Positions of the model's attributes among the classifier's."""
        return attribute_positions(self.classifier.attributes, self.info.attributes)

    @cached_property
    def requested(self) -> np.ndarray:
        """Attributes that the model reads, of the n images, uint8 [n, A].

        Each is also the request for one sample.
        """
        return self.labels(self.settings.split)[self.positions(self.settings.split)]

    @cached_property
    def annotated(self) -> np.ndarray:
        """All attributes of the n images in the classifier's order, uint8 [n, A]."""
        shards = self.splits[self.settings.split]
        chosen = shards.attributes()[self.positions(self.settings.split)]
        return chosen[:, attribute_positions(shards.attribute_names, self.classifier.attributes)]

    @cached_property
    def counts(self) -> Counts:
        """How often the model's attributes occur together, in annotations, in train and held out.

        Held out means val and test for final numbers, and val alone while choices are made on val.
        """
        held_out = [self.labels("val")]
        if self.settings.split == "test":
            held_out.append(self.labels("test"))
        train = self.labels("train")
        annotated = train
        if self.annotations is not None:
            read = attribute_positions(self.splits["train"].attribute_names, self.info.attributes)
            annotated = self.annotations.labels[self.annotations.splits == 0][:, read]
        exclusive = self.dataset.exclusive
        return Counts(annotated, train, np.concatenate(held_out), self.info.attributes, exclusive)

    def positions(self, split: str) -> np.ndarray:
        """Positions of the images that represent a split: [n], or all of a smaller split."""
        total = len(self.splits[split])
        return spread(min(self.n, total), total)

    def labels(self, split: str) -> np.ndarray:
        """The attributes of a whole split that the model reads, uint8 [N, A]."""
        shards = self.splits[split]
        return shards.attributes()[:, attribute_positions(shards.attribute_names, self.info.attributes)]

    def requests(self, attributes: tuple[str, ...], n: int) -> np.ndarray:
        """`n` rows of the split's attributes, uint8 [n, A], in which `attributes` are set."""
        labels = self.labels(self.settings.split)
        exclusive = self.dataset.exclusive
        return requests(labels, self.info.attributes, attributes, n, self.settings.seed, exclusive)

    def noise(self, purpose: str, indices: np.ndarray, *shape: int) -> Tensor:
        """Standard normal noise [n, *shape, D], a function of seed, purpose and index."""
        noise = keyed_normal(self.settings.seed, purpose, indices, (*shape, self.model.z_dim))
        return noise.to(self.ranks.device)

    def condition(self, labels: np.ndarray) -> Tensor:
        """Convert attributes [n, A] to the model's input."""
        return torch.from_numpy(labels).to(self.ranks.device, torch.float32)

    def images(self, indices: np.ndarray) -> Tensor:
        """Real images [b, 3, S, S] in [-1, 1]."""
        split = self.settings.split
        images, _ = self.splits[split].gather(self.positions(split)[indices])
        return to_float(torch.from_numpy(images).to(self.ranks.device))

    def reconstruct(self, indices: np.ndarray) -> tuple[Tensor, Tensor, DiagonalGaussian]:
        """Return real images [b, 3, S, S], their reconstructions and their posterior."""
        x, y = self.images(indices), self.condition(self.requested[indices])
        q = self.model.encode(x, y)
        return x, self.model.decode(q.mean, y), q

    def draw(self, purpose: str, indices: np.ndarray, labels: np.ndarray) -> Tensor:
        """Draw samples [b, 3, S, S] for attributes [b, A], each with the noise of its index."""
        y = self.condition(labels)
        return self.model.decode(self._drawn(purpose, indices, y)[1], y)

    def draw_named(self, attributes: tuple[str, ...], indices: np.ndarray, labels: np.ndarray) -> Tensor:
        """Draw samples [b, 3, S, S] for `requests` that name `attributes`, with `eval.margin`."""
        y = self.condition(labels)
        asked = torch.full_like(y, UNKNOWN)
        columns = [self.info.attributes.index(name) for name in attributes]
        asked[:, columns] = y[:, columns]
        return self.model.decode(self._drawn(purpose_of(attributes), indices, y, asked)[1], y)

    def _drawn(
        self, purpose: str, indices: np.ndarray, y: Tensor, asked: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return noise and code [b, D] of one sample for each index, drawn `eval.tries` times at most.

        What is `asked` [b, A] for by name is made clear; 0.5 elsewhere.
        """

        def code(noise: Tensor, rows: Tensor) -> Tensor:
            z = self.prior(y[rows]).sample(noise)
            return z if asked is None else self._clear(z, asked[rows])

        noise = self.noise(purpose, indices, self.settings.tries)
        return draw_again(noise, code, lambda z, rows: self.model.anomaly_of(z, y[rows]))

    def prior(self, y: Tensor) -> Distribution:
        """Return p(z|y), with the guidance of the configuration. Raises ConfigError."""
        with self._guidance("eval.guidance", self.settings.guidance):
            return self.model.guided_prior(y, self.settings.guidance)

    @contextmanager
    def _guidance(self, key: str, strength: float) -> Iterator[None]:
        """Raise ConfigError that names the key if the prior cannot be guided."""
        try:
            yield
        except ValueError:
            raise ConfigError(
                f"key '{key}': got {strength}, expected 1, because this prior cannot be guided; "
                "refine the run with refine.prior.name=flow_matching"
            ) from None

    def flip(self, indices: np.ndarray, asked: np.ndarray, wanted: np.ndarray) -> Tensor:
        """Draw samples [b, 3, S, S] of the noise of `indices` for `wanted`, a change of `asked` [b, A].

        With an attribute control, the sample for `asked` is drawn and its code is moved. Without one, the
        noise is drawn for `wanted`. Rows of the same index ask for the same and share one draw.
        """
        single, first, row = np.unique(indices, return_index=True, return_inverse=True)
        before = self.condition(asked)
        noise, code = self._drawn("flips", single, before[first])
        if self.model.control is None:
            return self._carried(noise[row], before, self.condition(wanted))
        return self._moved(code[row], before, self.condition(wanted))

    def edit(self, indices: np.ndarray, asked: np.ndarray, wanted: np.ndarray) -> Tensor:
        """Change real images [b] with attributes `asked` [b, A] to `wanted`, [b, 3, S, S].

        An attribute control moves the code. Without one, the code keeps its noise:
        u = noise(z; asked), then z' = sample(u; wanted), then decode.
        """
        before, after = self.condition(asked), self.condition(wanted)
        code = self.model.encode(self.images(indices), before).mean
        if self.model.control is None:
            return self._carried(self.model.prior(before).to_noise(code), before, after)
        return self._moved(code, before, after)

    def _clear(self, z: Tensor, asked: Tensor) -> Tensor:
        """Move codes [b, D] until they show what is asked for; `asked` [b, A] is 0.5 elsewhere."""
        if not self.settings.margin:
            return z
        if self.model.control is None:
            raise ConfigError(
                f"key 'eval.margin': got {self.settings.margin}, but this model has no attribute control;"
                " set eval.margin=0, or refine the run with refine.prior.control=true"
            )
        return self.model.control.obey(z, asked, self.settings.margin)

    def _moved(self, z: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Decode codes [b, D] whose changed attributes are moved with `edit_strength`."""
        assert self.model.control is not None
        z = self.model.control.edit(z, before, after, self.settings.edit_strength)
        return self.model.decode(z, after)

    def _carried(self, noise: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Decode codes of `noise` for `after`; its difference from `before` acts with `edit_strength`."""
        prior = self.model.prior(after)
        strength = self.settings.edit_strength
        if strength != 1.0:
            with self._guidance("eval.edit_strength", strength):
                prior = prior.guided(self.model.prior(before), strength)
        return self.model.decode(prior.sample(noise), after)

    def frequent(self, most: int) -> np.ndarray:
        """Positions of the most frequent attributes that the model reads, by training images."""
        share = self.labels("train").mean(0)
        return np.argsort(-share, kind="stable")[:most]

    def classifier_features(self, x: Tensor) -> Tensor:
        """The attribute classifier's features [b, 512] of images [b, 3, S, S] in [-1, 1]."""
        judges = [extractor for extractor in self.extractors if extractor.metric == "fd_classifier"]
        return judges[0](to_uint8(x))

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features of images [b, 3, S, S] in [-1, 1], one entry per extractor."""
        images = to_uint8(x)  # rounded like stored images, so that no network sees finer levels
        return {extractor.metric: extractor(images) for extractor in self.extractors}

    def mse(self, x: Tensor, decoded: Tensor) -> Tensor:
        """Mean squared error per image on the [0, 1] scale, float64 [b]."""
        total = squared_error(x, decoded).double()
        return total / (4 * self.model.pixels)  # [-1, 1] -> [0, 1] halves an error

    def map(self, rows: Callable[[np.ndarray], dict[str, Tensor]], n: int) -> Rows:
        """Call `rows` on blocks of the indices 0 .. n - 1 (all ranks take part)."""
        return map_blocks(rows, n, self.settings.block, self.ranks, self.watch)


def edges(x: Tensor) -> Tensor:
    """Mean squared Laplacian of the grey image, [B, 3, S, S] in [-1, 1] -> [B]. Blur lowers it."""
    grey = x.mean(1, keepdim=True)
    kernel = grey.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return torch.nn.functional.conv2d(grey, kernel).double().square().flatten(1).mean(1)

"""What is measured: features and scores of real images, reconstructions and samples, one row per image.

Every part is computed when it is first asked for, in fixed blocks of images spread over all ranks, so all ranks must ask for
it together. Noise is keyed by image: the rows do not depend on the number of ranks. Numbers are then made of them on rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvae.distributions import DiagonalGaussian
from cvae.losses import importance_weighted_bound, squared_error
from cvae.model import CVAE
from pipeline.data.loader import columns, to_float
from pipeline.data.shards import Shards
from pipeline.evaluation.blocks import map_blocks, spread, to_uint8
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.features import Features
from pipeline.evaluation.rare import Pair, rare_pairs, requests
from pipeline.evaluation.reference import reference_features, reference_key
from pipeline.runtime.checkpoint import CheckpointInfo
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.keyed import keyed_normal
from pipeline.schema import EvalConfig

Rows = dict[str, np.ndarray]  # named rows [n, ...]; the features under the name of their metric


@dataclass(frozen=True)
class Evidence:
    """The model under test, the judges, and the images. `splits`: train, val and test."""

    model: CVAE
    info: CheckpointInfo
    classifier: Classifier
    extractors: list[Features]
    settings: EvalConfig
    splits: dict[str, Shards]
    ranks: Ranks
    reference_dir: Path
    crop: int

    @property
    def n(self) -> int:
        """Images measured."""
        return min(self.settings.n, len(self.splits[self.settings.split]))

    def positions(self, split: str) -> np.ndarray:
        """Which images stand for a split, [n] or all that it has."""
        total = len(self.splits[split])
        return spread(min(self.n, total), total)

    @property
    def read_columns(self) -> list[int]:
        """Where the attributes that the model reads stand among those of the classifier."""
        return columns(self.classifier.attributes, self.info.attributes)

    def labels(self, split: str) -> np.ndarray:
        """The attributes of a whole split that the model reads, uint8 [N, A read]."""
        shards = self.splits[split]
        return shards.attributes()[:, columns(shards.attribute_names, self.info.attributes)]

    @cached_property
    def requested(self) -> np.ndarray:
        """The attributes of the n images, which are also asked of the n samples, uint8 [n, A]."""
        return self.labels(self.settings.split)[self.positions(self.settings.split)]

    @cached_property
    def annotated(self) -> np.ndarray:
        """All attributes of the n images, in the classifier's order, uint8 [n, A]."""
        shards = self.splits[self.settings.split]
        return shards.attributes()[self.positions(self.settings.split)][:, columns(shards.attribute_names, self.classifier.attributes)]

    @cached_property
    def real(self) -> Rows:
        """Features of the n real images."""
        return self._reference(self.settings.split)

    @cached_property
    def train(self) -> Rows:
        """Features of as many training images."""
        return self._reference("train")

    def reference_keys(self, split: str) -> list[dict[str, Any]]:
        """What the cached features of a split depend on, one for each extractor."""
        shards, n = self.splits[split], len(self.positions(split))
        return [reference_key(shards, split, n, self.settings.block, extractor, self.crop) for extractor in self.extractors]

    def _reference(self, split: str) -> Rows:
        return {
            extractor.metric: reference_features(self.reference_dir, self.splits[split], key, extractor, self.ranks)
            for extractor, key in zip(self.extractors, self.reference_keys(split), strict=True)
        }

    @cached_property
    def mean_image(self) -> Rows:
        """The mean of those training images: its features [1, F] and its "mse" [n] on the [0, 1] scale, what knowing nothing reaches."""
        shards, positions, block = self.splits["train"], self.positions("train"), self.settings.block
        blocks = (shards.gather(positions[i : i + block])[0] for i in range(0, len(positions), block))
        total = sum(images.sum(0, dtype=np.float64) for images in blocks)
        mean = to_float(torch.from_numpy(total[None] / len(positions)).to(self.ranks.device))

        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            return {"mse": self._mse(self._images(indices), mean)}

        features = {name: x.cpu().numpy() for name, x in self._features(mean).items()}
        return features | map_blocks(rows, self.n, block, self.ranks)

    @cached_property
    def reconstructions(self) -> Rows:
        """Of the posterior's mean: features, "mse" [n] on the [0, 1] scale, and q(z|x,y): "mean", "variance" [n, D]."""

        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            x, decoded, q = self.reconstruct(indices)
            return self._features(decoded) | {"mse": self._mse(x, decoded), "mean": q.mean, "variance": (2 * q.log_std).exp()}

        return map_blocks(rows, self.n, self.settings.block, self.ranks)

    @cached_property
    def samples(self) -> Rows:
        """Features of one sample for each row of `requested`."""
        return self._sample("samples", self.requested)

    @cached_property
    def rare(self) -> list[tuple[Pair, Rows]]:
        """Features of `rare_samples` samples for each rare pair of attributes."""
        names, held_out = self.info.attributes, np.concatenate([self.labels("val"), self.labels("test")])
        wanted = [
            (pair, requests(self.labels(self.settings.split), names, pair.attributes, self.settings.rare_samples, self.settings.seed))
            for pair in rare_pairs(self.labels("train"), held_out, names)
        ]
        return [(pair, self._sample("rare/" + "+".join(pair.attributes), labels)) for pair, labels in wanted if len(labels)]

    @cached_property
    def log_likelihood(self) -> Rows:
        """Importance-weighted bound on log p(x|y) for `iw_images` of the images, nats [m].

        "iw" with the model's own decoder variance and, where that was not fitted, "iw_fitted" with SSE / (N P) of training images.
        """
        variances = {"iw": self.info.s2} | ({"iw_fitted": self.info.s2_fit} if self.info.s2_fit != self.info.s2 else {})
        chosen = spread(min(self.n, self.settings.iw_images), self.n)

        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            indices = chosen[indices]
            y, noise = self._condition(self.requested[indices]), self._noise("importance", indices, self.settings.iw_samples)
            x, noise = self._images(indices), noise.transpose(0, 1)
            return {name: importance_weighted_bound(self.model, x, y, noise, s2) for name, s2 in variances.items()}

        return map_blocks(rows, len(chosen), self.settings.block, self.ranks)

    def reconstruct(self, indices: np.ndarray) -> tuple[Tensor, Tensor, DiagonalGaussian]:
        """Real images [b, 3, S, S], what the decoder makes of their posterior's mean, and the posterior."""
        x, y = self._images(indices), self._condition(self.requested[indices])
        q = self.model.encode(x, y)
        return x, self.model.decode(q.mean, y), q

    def draw(self, purpose: str, indices: np.ndarray, labels: np.ndarray) -> Tensor:
        """Samples [b, 3, S, S] of p(x|y) for attributes [b, A], each with the noise of its index."""
        y = self._condition(labels)
        return self.model.decode(self.model.prior(y).sample(self._noise(purpose, indices)), y)

    def _sample(self, purpose: str, labels: np.ndarray) -> Rows:
        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            return self._features(self.draw(purpose, indices, labels[indices]))

        return map_blocks(rows, len(labels), self.settings.block, self.ranks)

    def _noise(self, purpose: str, indices: np.ndarray, *shape: int) -> Tensor:
        return keyed_normal(self.settings.seed, purpose, indices, (*shape, self.model.z_dim)).to(self.ranks.device)

    def _condition(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels).to(self.ranks.device, torch.float32)

    def _images(self, indices: np.ndarray) -> Tensor:
        split = self.settings.split
        images, _ = self.splits[split].gather(self.positions(split)[indices])
        return to_float(torch.from_numpy(images).to(self.ranks.device))

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        images = to_uint8(x)  # as real images come: no feature may see what rounding would have removed
        return {extractor.metric: extractor(images) for extractor in self.extractors}

    def _mse(self, x: Tensor, decoded: Tensor) -> Tensor:
        return squared_error(x, decoded).double() / (4 * self.model.pixels)  # [-1, 1] -> [0, 1] halves an error

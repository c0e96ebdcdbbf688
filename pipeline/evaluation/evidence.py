"""What is measured: features and scores of real images, reconstructions and samples, one row per image.

Every part is computed when it is first asked for, in fixed blocks of images spread over all ranks, so all ranks must ask for
it together. Noise is keyed by image: the rows do not depend on the number of ranks. Numbers are then made of them on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvae.distributions import DiagonalGaussian, Distribution, FlowDistribution
from cvae.importance import importance_weighted_bound
from cvae.losses import squared_error
from cvae.model import CVAE
from pipeline.config.schema import EvalConfig
from pipeline.data.loader import columns, to_float
from pipeline.data.pixels import to_uint8
from pipeline.data.shards import Shards
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.features import Features
from pipeline.evaluation.rare import FIGURE_5, Combination, Counts, requests
from pipeline.evaluation.reference import reference_features, reference_key
from pipeline.runtime.blocks import map_blocks
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.keyed import keyed_normal
from pipeline.runtime.split import spread
from pipeline.training.checkpoint import CheckpointInfo

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
    annotations: tuple[np.ndarray, np.ndarray] | None = (
        None  # of all of CelebA, where its files are at hand: uint8 [N, A], split [N]
    )
    clock: dict[str, float] = field(default_factory=dict)  # seconds

    def has(self, *parts: str) -> bool:
        """Whether these parts were computed: rank 0 may look at them alone."""
        return self.__dict__.keys() >= set(parts)

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
        return shards.attributes()[self.positions(self.settings.split)][
            :, columns(shards.attribute_names, self.classifier.attributes)
        ]

    @cached_property
    def real(self) -> Rows:
        """Features of the n real images."""
        return self._reference(self.settings.split)

    @cached_property
    def train(self) -> Rows:
        """Features of as many training images."""
        return self._reference("train")

    @cached_property
    def memory(self) -> Rows:
        """The first extractor's features of `neighbour_images` training images: what could have been learnt by heart."""
        shards, (extractor, *_) = self.splits["train"], self.extractors
        key = reference_key(shards, "train", self.memory_n, self.settings.block, extractor, self.crop)
        return {
            extractor.metric: reference_features(
                self.reference_dir, shards, key, extractor, self.ranks, self.clock
            )
        }

    @property
    def memory_n(self) -> int:
        """Training images in `memory`."""
        return min(self.settings.neighbour_images, len(self.splits["train"]))

    def reference_keys(self, split: str) -> list[dict[str, Any]]:
        """What the cached features of a split depend on, one for each extractor."""
        shards, n = self.splits[split], len(self.positions(split))
        return [
            reference_key(shards, split, n, self.settings.block, extractor, self.crop)
            for extractor in self.extractors
        ]

    def _reference(self, split: str) -> Rows:
        return {
            extractor.metric: reference_features(
                self.reference_dir, self.splits[split], key, extractor, self.ranks, self.clock
            )
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
        return features | self._map(rows, self.n)

    @cached_property
    def reconstructions(self) -> Rows:
        """Of the posterior's mean: features, "mse" [n] on the [0, 1] scale, "edges" and those of the real image, and q's moments [n, D]."""

        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            x, decoded, q = self.reconstruct(indices)
            measured = {"mse": self._mse(x, decoded), "edges": edges(decoded), "real_edges": edges(x)}
            return self._features(decoded) | measured | {"mean": q.mean, "variance": (2 * q.log_std).exp()}

        return self._map(rows, self.n)

    @cached_property
    def latents(self) -> Rows:
        """z ~ q(z|x,y) as "encoded" and z ~ p(z|y) as "drawn" [n, D], their log-densities under p(z|y), and log|det df/dz| of "drawn"."""

        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            y = self.condition(self.requested[indices])
            prior = self.model.prior(y)
            encoded = self.model.encode(self._images(indices), y).sample(self.noise("encoded", indices))
            drawn = prior.sample(self.noise("samples", indices))
            found = {
                "encoded": encoded,
                "drawn": drawn,
                "log_p_encoded": prior.log_prob(encoded),
                "log_p_drawn": prior.log_prob(drawn),
            }
            return found | {"log_det": log_det(prior, drawn)}

        return self._map(rows, self.n)

    @cached_property
    def samples(self) -> Rows:
        """Features and "edges" of one sample for each row of `requested`."""
        return self._sample("samples", self.requested)

    @cached_property
    def counts(self) -> Counts:
        """How often the attributes that the model reads occur together: in all annotations of the training partition, in train, held out.

        Held out are val and test for final numbers, val alone for choices.
        """
        held_out = [self.labels(split) for split in ("val", "test") if split in ("val", self.settings.split)]
        train = self.labels("train")
        annotated = (
            self.annotations[0][self.annotations[1] == 0][:, self._read_of_all] if self.annotations else train
        )
        return Counts(annotated, train, np.concatenate(held_out), self.info.attributes)

    @property
    def _read_of_all(self) -> list[int]:
        return columns(self.splits["train"].attribute_names, self.info.attributes)

    @cached_property
    def combinations(self) -> list[Combination]:
        """The rarest pairs, then triples, then the paper's own cases; rank 0's choice, for its files are the ones that were read."""
        names, chosen = self.info.attributes, torch.full((64, 3), -1.0, dtype=torch.float64)
        if self.ranks.is_main:
            figure = [tuple(map(names.index, case)) for case in FIGURE_5 if set(case) <= set(names)]
            for row, combination in zip(
                chosen, [*self.counts.rare(2), *self.counts.rare(3), *figure], strict=False
            ):
                row[: len(combination)] = torch.tensor(combination)
        chosen = self.ranks.reduce_sum((chosen + 1).to(self.ranks.device) * self.ranks.is_main).long() - 1
        return [self.counts.of(tuple(i for i in row if i >= 0)) for row in chosen.tolist() if row[0] >= 0]

    @cached_property
    def rare(self) -> list[tuple[Combination, Rows]]:
        """Features of `rare_samples` samples for each of `combinations`."""
        labels, settings = self.labels(self.settings.split), self.settings
        return [
            (
                c,
                self._sample(
                    "rare/" + "+".join(c.attributes), self.requests(c.attributes, settings.rare_samples)
                ),
            )
            for c in self.combinations
            if len(labels) and settings.rare_samples
        ]

    def requests(self, attributes: tuple[str, ...], n: int) -> np.ndarray:
        """`n` rows of attributes of the split, uint8 [n, A], in which `attributes` are set."""
        return requests(
            self.labels(self.settings.split), self.info.attributes, attributes, n, self.settings.seed
        )

    @cached_property
    def log_likelihood(self) -> Rows:
        """Importance-weighted bound on log p(x|y) for `iw_images` of the images, nats [m].

        "iw" with the model's own decoder variance and, where that was not fitted, "iw_fitted" with SSE / (N P) of training images.
        """
        variances = {"iw": self.info.s2} | (
            {"iw_fitted": self.info.s2_fit} if self.info.s2_fit != self.info.s2 else {}
        )
        chosen = spread(min(self.n, self.settings.iw_images), self.n)

        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            indices = chosen[indices]
            y, noise = (
                self.condition(self.requested[indices]),
                self.noise("importance", indices, self.settings.iw_samples),
            )
            x, noise = self._images(indices), noise.transpose(0, 1)
            return {
                name: importance_weighted_bound(self.model, x, y, noise, s2) for name, s2 in variances.items()
            }

        return self._map(rows, len(chosen))

    def reconstruct(self, indices: np.ndarray) -> tuple[Tensor, Tensor, DiagonalGaussian]:
        """Real images [b, 3, S, S], what the decoder makes of their posterior's mean, and the posterior."""
        x, y = self._images(indices), self.condition(self.requested[indices])
        q = self.model.encode(x, y)
        return x, self.model.decode(q.mean, y), q

    def draw(self, purpose: str, indices: np.ndarray, labels: np.ndarray) -> Tensor:
        """Samples [b, 3, S, S] of p(x|y) for attributes [b, A], each with the noise of its index."""
        y = self.condition(labels)
        return self.model.decode(self.model.prior(y).sample(self.noise(purpose, indices)), y)

    def _sample(self, purpose: str, labels: np.ndarray) -> Rows:
        def rows(indices: np.ndarray) -> dict[str, Tensor]:
            x = self.draw(purpose, indices, labels[indices])
            return self._features(x) | {"edges": edges(x)}

        return self._map(rows, len(labels))

    def _map(self, rows: Callable[[np.ndarray], dict[str, Tensor]], n: int) -> Rows:
        return map_blocks(rows, n, self.settings.block, self.ranks, self.clock)

    def noise(self, purpose: str, indices: np.ndarray, *shape: int) -> Tensor:
        """Standard normal [n, *shape, D], a function of purpose and index alone."""
        return keyed_normal(self.settings.seed, purpose, indices, (*shape, self.model.z_dim)).to(
            self.ranks.device
        )

    def condition(self, labels: np.ndarray) -> Tensor:
        """Rows of attributes as the model takes them."""
        return torch.from_numpy(labels).to(self.ranks.device, torch.float32)

    def _images(self, indices: np.ndarray) -> Tensor:
        split = self.settings.split
        images, _ = self.splits[split].gather(self.positions(split)[indices])
        return to_float(torch.from_numpy(images).to(self.ranks.device))

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        images = to_uint8(x)  # as real images come: no feature may see what rounding would have removed
        return {extractor.metric: extractor(images) for extractor in self.extractors}

    def _mse(self, x: Tensor, decoded: Tensor) -> Tensor:
        return squared_error(x, decoded).double() / (
            4 * self.model.pixels
        )  # [-1, 1] -> [0, 1] halves an error


def edges(x: Tensor) -> Tensor:
    """Mean squared Laplacian of the grey image, [B, 3, S, S] in [-1, 1] -> [B]: what blur takes away."""
    grey = x.mean(1, keepdim=True)
    kernel = grey.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return torch.nn.functional.conv2d(grey, kernel).double().square().flatten(1).mean(1)


def log_det(prior: Distribution, z: Tensor) -> Tensor:
    """log|det df/dz| at z [B, D] -> [B]; 0 without a flow."""
    return prior.flow(z, prior.e)[1] if isinstance(prior, FlowDistribution) else z.new_zeros(len(z))

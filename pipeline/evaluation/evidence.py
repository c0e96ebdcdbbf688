"""What is measured: features and scores of real images, reconstructions and samples, one row per image.

Every part is computed when it is first asked for, in fixed blocks of images spread over all ranks, so all ranks must ask for
it together. Noise is keyed by image: the rows do not depend on the number of ranks. Numbers are then made of them on rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvae.losses import importance_weighted_bound, squared_error
from cvae.model import CVAE
from pipeline.config import EvalConfig
from pipeline.data.loader import columns, to_float
from pipeline.data.shards import Shards
from pipeline.evaluation.blocks import map_blocks, to_uint8
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.features import Features
from pipeline.evaluation.rare import Pair, rare_pairs, requests
from pipeline.evaluation.reference import reference_features, reference_key
from pipeline.runtime.checkpoint import CheckpointInfo
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.keyed import keyed_normal

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
    def shards(self) -> Shards:
        """The split that is evaluated."""
        return self.splits[self.settings.split]

    @property
    def n(self) -> int:
        """Images measured: the first ones of the split, which are a random part of it (the shards are shuffled)."""
        return min(self.settings.n, len(self.shards))

    @cached_property
    def labels(self) -> np.ndarray:
        """Attributes of the first n images that the model reads, uint8 [n, A]."""
        return self._read_by_model("labels", self.settings.split)[: self.n]

    def columns(self) -> list[int]:
        """Where the attributes that the model reads stand among those of the classifier."""
        return columns(self.classifier.attributes, self.info.attributes)

    def _read_by_model(self, what: str, split: str) -> np.ndarray:
        shards = self.splits[split]
        return shards.attributes()[:, columns(shards.attribute_names, self.info.attributes)]

    def noise(self, purpose: str, indices: np.ndarray, *shape: int) -> Tensor:
        """Standard normal [b, *shape, D], each image's own."""
        return keyed_normal(self.settings.seed, purpose, indices, (*shape, self.model.z_dim)).to(self.ranks.device)

    def request(self, labels: np.ndarray) -> Tensor:
        """Attributes [b, A] as the model reads them."""
        return torch.from_numpy(labels).to(self.ranks.device, torch.float32)

    def images(self, indices: np.ndarray) -> Tensor:
        """Real images [b, 3, S, S] in [-1, 1]."""
        return to_float(torch.from_numpy(self.shards.gather(indices)[0]).to(self.ranks.device))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images [b, S, S, 3] by the names of their metrics."""
        return {extractor.metric: extractor(images) for extractor in self.extractors}

    def _map(self, function, n: int, block: int | None = None) -> Rows:  # type: ignore[no-untyped-def]
        return map_blocks(function, n, block or self.settings.block, self.ranks)

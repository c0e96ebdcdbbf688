"""Features of real images, computed once and kept: every run is measured against the same ones."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from pipeline.config import digest
from pipeline.data.shards import Shards
from pipeline.errors import DataError
from pipeline.evaluation.blocks import map_blocks, spread
from pipeline.evaluation.features import Features
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.files import write_bytes


def library_versions() -> dict[str, str]:
    """The libraries on whose version a feature or a distance may depend."""
    return {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")}


def reference_key(shards: Shards, split: str, n: int, block: int, extractor: Features, crop: int) -> dict[str, Any]:
    """Everything that the features of `n` real images of a split depend on."""
    images = {"shards": shards.content_digest, "split": split, "n": n, "crop": crop, "size": shards.size, "block": block}
    return {**images, "features": extractor.metric, "features_digest": extractor.digest, "versions": library_versions()}


def reference_features(folder: Path, shards: Shards, key: dict[str, Any], extractor: Features, ranks: Ranks) -> np.ndarray:
    """Features [n, F] of the images that `key` describes, from the cache where it holds them (all ranks take part).

    On a hit only rank 0 has rows, because only rank 0 computes numbers. Raises DataError where the cached file is damaged.
    """
    file = folder / digest(key) / "features.safetensors"
    found = ranks.reduce_sum(torch.tensor([float(ranks.is_main and file.exists())], device=ranks.device))
    if found.item():
        return _read(file) if ranks.is_main else np.zeros((0, 0), np.float32)

    positions = spread(key["n"], len(shards))

    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        return {"features": extractor(torch.from_numpy(shards.gather(positions[indices])[0]))}

    features = map_blocks(rows, key["n"], key["block"], ranks)["features"]
    if ranks.is_main:
        write_bytes(file, safetensors.numpy.save({"features": features}, {name: str(value) for name, value in key.items()}))
    return features


def _read(file: Path) -> np.ndarray:
    try:
        return safetensors.numpy.load_file(file)["features"]
    except (safetensors.SafetensorError, KeyError) as error:
        raise DataError(f"{file}: damaged ({error}); delete it, and it is computed again") from None

"""Features of real images, computed once and kept: every run is measured against the same ones."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from pipeline.config.load import digest
from pipeline.data.shards import Shards
from pipeline.errors import DataError
from pipeline.evaluation.features import Features
from pipeline.rundir.files import write_bytes
from pipeline.rundir.lock import locked
from pipeline.runtime.blocks import map_blocks
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.split import spread

WAIT_S = 300.0  # below the time-out of a process group: the other ranks wait in a collective meanwhile


def library_versions() -> dict[str, str]:
    """The libraries on whose version a feature or a distance may depend."""
    return {
        name: importlib.metadata.version(name) for name in ("torch", "torchvision", "torch-fidelity", "numpy")
    }


def reference_key(
    shards: Shards, split: str, n: int, block: int, extractor: Features, crop: int
) -> dict[str, Any]:
    """Everything that the features of `n` real images of a split depend on."""
    images = {
        "shards": shards.content_digest,
        "split": split,
        "n": n,
        "crop": crop,
        "size": shards.size,
        "block": block,
    }
    return {
        **images,
        "features": extractor.metric,
        "features_digest": extractor.digest,
        "versions": library_versions(),
    }


def reference_features(
    folder: Path,
    shards: Shards,
    key: dict[str, Any],
    extractor: Features,
    ranks: Ranks,
    clock: dict[str, float] | None = None,
) -> np.ndarray:
    """Features [n, F] of the images that `key` describes, from the cache where it holds them (all ranks take part).

    On a hit only rank 0 has rows, because only rank 0 computes numbers. Of several jobs that miss at a time one computes, the others
    wait for it, at most WAIT_S: then they compute the same rows too, and whoever is last replaces the file by an equal one.
    Raises DataError where the cached file is damaged.
    """
    file = folder / digest(key) / "features.safetensors"
    with _turn(file) if ranks.is_main else nullcontext():
        found = ranks.reduce_sum(torch.tensor([float(ranks.is_main and file.exists())], device=ranks.device))
        if found.item():
            return _read(file) if ranks.is_main else np.zeros((0, 0), np.float32)
        return _compute(file, shards, key, extractor, ranks, clock)


def _compute(
    file: Path,
    shards: Shards,
    key: dict[str, Any],
    extractor: Features,
    ranks: Ranks,
    clock: dict[str, float] | None,
) -> np.ndarray:

    positions = spread(key["n"], len(shards))

    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        return {"features": extractor(torch.from_numpy(shards.gather(positions[indices])[0]))}

    features = map_blocks(rows, key["n"], key["block"], ranks, clock)["features"]
    if ranks.is_main:
        write_bytes(
            file,
            safetensors.numpy.save({"features": features}, {name: str(value) for name, value in key.items()}),
        )
    return features


@contextmanager
def _turn(file: Path) -> Iterator[None]:
    """Hold the lock beside `file`, or stop waiting for it once the file is there or WAIT_S are over."""
    give_up = time.monotonic() + WAIT_S

    def keep_waiting() -> bool:
        return not file.exists() and time.monotonic() < give_up

    with locked(file.with_suffix(".lock"), keep_waiting=keep_waiting):
        yield


def _read(file: Path) -> np.ndarray:
    try:
        return safetensors.numpy.load_file(file)["features"]
    except (safetensors.SafetensorError, KeyError) as error:
        raise DataError(f"{file}: damaged ({error}); delete it, and it is computed again") from None

"""Cached features of real images, so that every run is measured against the same ones."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator
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
from pipeline.rundir.layout import REFERENCE
from pipeline.rundir.lock import locked
from pipeline.runtime.blocks import Watch, map_blocks
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.split import spread

WAIT_S = 300.0  # shorter than the time-out of a process group, whose other ranks wait in a collective
LIBRARIES = ("torch", "torchvision", "torch-fidelity", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that may change a feature or a distance."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def reference_key(
    shards: Shards, split: str, n: int, block: int, extractor: Features, crop: int
) -> dict[str, Any]:
    """Everything that the features of `n` real images of a split depend on."""
    return {
        "shards": shards.content_digest,
        "split": split,
        "n": n,
        "crop": crop,
        "size": shards.size,
        "block": block,
        "features": extractor.metric,
        "features_digest": extractor.digest,
        "versions": library_versions(),
    }


def reference_features(
    folder: Callable[[str], Path],
    shards: Shards,
    key: dict[str, Any],
    extractor: Features,
    ranks: Ranks,
    watch: Watch | None = None,
) -> np.ndarray:
    """Return features [n, F] of the images that `key` describes (all ranks take part).

    They come from the cache if it holds them. `folder` gives the cache's folder for the digest of `key`.

    On a hit only rank 0 has rows, because only rank 0 computes numbers. If several jobs miss at the
    same time, one computes and the others wait for it, at most WAIT_S. After that they compute the
    same rows too, and the last one replaces the file by an equal one. Raises DataError if the
    cached file is damaged.
    """
    file = folder(digest(key)) / REFERENCE
    with _turn(file) if ranks.is_main else nullcontext():
        there = float(ranks.is_main and file.exists())
        found = ranks.reduce_sum(torch.tensor([there], device=ranks.device))
        if not found.item():
            return _compute(file, shards, key, extractor, ranks, watch)
        if not ranks.is_main:
            return np.zeros((0, 0), np.float32)
        return _read(file)


def _compute(
    file: Path,
    shards: Shards,
    key: dict[str, Any],
    extractor: Features,
    ranks: Ranks,
    watch: Watch | None,
) -> np.ndarray:
    positions = spread(key["n"], len(shards))

    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        images, _ = shards.gather(positions[indices])
        return {"features": extractor(torch.from_numpy(images))}

    features = map_blocks(rows, key["n"], key["block"], ranks, watch)["features"]
    if ranks.is_main:
        metadata = {name: str(value) for name, value in key.items()}
        write_bytes(file, safetensors.numpy.save({"features": features}, metadata))
    return features


@contextmanager
def _turn(file: Path) -> Iterator[None]:
    """Hold the lock beside `file`.

    Stop waiting for it once the file is there or WAIT_S are over. A file that is there already needs no
    lock: it may lie in a folder that this user can only read.
    """
    if file.exists():
        yield
        return
    give_up = time.monotonic() + WAIT_S

    def keep_waiting() -> bool:
        return not file.exists() and time.monotonic() < give_up

    with locked(file.with_suffix(".lock"), keep_waiting=keep_waiting):
        yield


def _read(file: Path) -> np.ndarray:
    try:
        return safetensors.numpy.load_file(file)["features"]
    except (safetensors.SafetensorError, KeyError) as error:
        raise DataError(
            f"{file}: damaged ({error}); delete it, and the next evaluation computes it again"
        ) from None

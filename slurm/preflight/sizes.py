"""How many bytes a run will write and read. What is known from a manifest is taken from there."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.paths import is_remote
from pipeline.config.schema import RunConfig, ShardConfig
from pipeline.data.encoded.packer import image_file
from pipeline.data.manifest import MANIFEST, entries_of, read_manifest
from pipeline.data.records import RecordFormat
from pipeline.data.sources.base import ImageError
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.data.sources.registry import open_source, recognise
from pipeline.errors import DataError
from pipeline.rundir.layout import checkpoints_dir, shards_dir, source_place
from pipeline.stages import STAGES
from slurm.chain import Run

PROBED = 16  # images by which the size of encoded samples is estimated
FIRST_GUESS = 200_000_000  # bytes of a checkpoint; the networks configured here need less


def shards_bytes(run: Run) -> int:
    """Return at most how many bytes the shard stage will write."""
    config = run.config
    if STAGES["shard"].complete(config, run.run_dir):
        return 0
    images, attributes = _expected(config)
    if config.shard.stored_as == "strided":
        return images * RecordFormat(config.shard.size, attributes).length
    return images * (_probe(config) + RecordFormat(1, attributes).length)


def stored_bytes(run: Run) -> int:
    """Return the bytes of all shards: those of the manifest, or an estimate while there is none."""
    manifest = _manifest(shards_dir(run.config))
    if manifest is None:
        return shards_bytes(run)
    return sum(entry["bytes"] for entry in entries_of(manifest))


def checkpoint_bytes(run: Run) -> int:
    """Return the bytes of the largest checkpoint of this run, or a guess that suits most models."""
    files = checkpoints_dir(run.run_dir).glob("*.safetensors")
    return max((file.stat().st_size for file in files), default=FIRST_GUESS)


def _expected(config: RunConfig) -> tuple[int, int]:
    """Return at most how many samples the source has, and how many attributes."""
    if not config.shard.source:
        return config.toy.n, len(CELEBA_ATTRIBUTES)
    source = source_place(config)
    try:
        return recognise(source, config.shard.source_kind).estimate(Path(source))
    except DataError:
        return 0, 1  # `source_is_there` reports it


def _manifest(folder: Path) -> dict[str, Any] | None:
    if not (folder / MANIFEST).exists():
        return None
    try:
        return read_manifest(folder, "ignore")
    except DataError:
        return None  # the stage that reads it says what is wrong


@lru_cache(maxsize=8)
def _probe_source(place: str, settings: ShardConfig) -> int:
    opened = open_source(place, settings)
    step = max(1, len(opened.names) // PROBED)
    lengths = []
    for name in opened.names[::step]:
        try:
            content, _ = image_file(opened.images, name)
        except ImageError:
            continue
        lengths.append(len(content))
    return sum(lengths) // max(1, len(lengths))


def _probe(config: RunConfig) -> int:
    """Return the mean bytes of a few image files; 0 for toy faces and for sources that are not on a disk."""
    if not config.shard.source or is_remote(config.shard.source):
        return 0
    try:
        return _probe_source(source_place(config), config.shard)
    except DataError:
        return 0  # the shard stage says what is wrong

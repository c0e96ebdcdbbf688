"""How many bytes a run will write and read, and how large the images are. A manifest tells most of it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from pipeline.config.paths import is_remote
from pipeline.config.schema import RunConfig, ShardConfig
from pipeline.data.encoded.packer import image_file
from pipeline.data.manifest import MANIFEST, entries_of, read_manifest
from pipeline.data.records import RecordFormat
from pipeline.data.sources.base import DatasetInfo, ImageError, require_sizes_fit, with_usual_crop
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.data.sources.registry import open_source, recognise
from pipeline.errors import DataError
from pipeline.rundir.layout import checkpoints_dir, shards_dir, source_place
from pipeline.stages import STAGES
from slurm.chain import Run

PROBED = 16  # images that are opened
_ONE_AT_A_TIME = Lock()
FIRST_GUESS = 200_000_000  # bytes of a checkpoint; the networks configured here need less


def shards_bytes(run: Run) -> int:
    """Return at most how many bytes the shard stage will write."""
    config = run.config
    if STAGES["shard"].complete(config, run.run_dir) or config.shard.format == "in_place":
        return 0
    images, attributes = _expected(config)
    if config.shard.stored_as == "strided":
        return images * RecordFormat(config.shard.size, attributes).length
    return images * (_mean_bytes(config) + RecordFormat(1, attributes).length)


def stored_bytes(run: Run) -> int:
    """Return the bytes of all shards: those of the manifest, or an estimate while there is none."""
    manifest = _manifest(shards_dir(run.config))
    if manifest is None:
        return shards_bytes(run)
    return sum(entry["bytes"] for entry in entries_of(manifest))


def image_size(config: RunConfig) -> int:
    """Return the side of the images that the nets will read, pixels: of the shards that are there, if any."""
    manifest = _manifest(shards_dir(config)) or {}
    return int(manifest.get("size", config.shard.size))


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


# ---- a few images of the source


def small_images(config: RunConfig) -> str:
    """Return what is wrong if some of a few images are too small for `shard.crop` or `shard.size`, or "".

    Raises DataError if the source is not sound, and ConfigError if all its images are too small.
    Sources that are not on a disk are not opened.
    """
    if is_remote(config.shard.source):
        return ""
    probe = _probe(source_place(config), config.shard)
    require_sizes_fit(config.shard, probe.info)
    shard = with_usual_crop(config.shard, probe.info)
    if shard.allow_upsampling and not shard.crop:
        return ""
    wanted = shard.crop or shard.size
    small = {where: side for where, side in probe.sides.items() if side < wanted}
    if not small or (shard.skip_damaged and len(small) < len(probe.sides)):
        return ""
    where, side = min(small.items(), key=lambda item: item[1])
    key = "crop" if shard.crop else "size"
    remedy = "" if shard.crop else ", or set shard.allow_upsampling=true"
    return (
        f"key 'shard.{key}': got {wanted}, but {len(small)} of {len(probe.sides)} images that were opened "
        f"are smaller, {where} has a side of {side} pixels; use at most shard.{key}={side}{remedy}"
    )


class _Probe(NamedTuple):
    """What the source and a few of its images tell."""

    info: DatasetInfo
    sides: dict[str, int]  # place of an image -> its shorter side, pixels
    bytes: int  # of an image file, on average


def _mean_bytes(config: RunConfig) -> int:
    """Return the mean bytes of a few image files; 0 for toy faces and for sources that are not on a disk."""
    if not config.shard.source or is_remote(config.shard.source):
        return 0
    try:
        return _probe(source_place(config), config.shard).bytes
    except DataError:
        return 0  # `source_is_there` reports it


def _probe(place: str, settings: ShardConfig) -> _Probe:
    with _ONE_AT_A_TIME:  # the runs of a sweep are checked side by side and have one source
        return _probe_once(place, settings)


@lru_cache(maxsize=8)
def _probe_once(place: str, settings: ShardConfig) -> _Probe:
    opened = open_source(place, settings)
    step = max(1, len(opened.names) // PROBED)
    sides, lengths = {}, []
    for name in opened.names[::step]:
        try:
            content, pixels = image_file(opened.images, name)
        except ImageError:
            continue
        sides[opened.images.where(name)] = min(pixels.shape[:2])
        lengths.append(len(content))
    return _Probe(opened.info, sides, sum(lengths) // max(1, len(lengths)))

"""The kinds of data set. A new kind is a file beside this one and its line in SOURCES."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.paths import is_remote
from pipeline.config.schema import RunConfig, ShardConfig
from pipeline.data.sources.base import Source
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_files import walk
from pipeline.data.sources.celeba_names import ATTRIBUTES_FILES, PARTITION_FILES
from pipeline.data.sources.facts import FACTS
from pipeline.data.sources.folder import celeba_hq
from pipeline.data.sources.folder.celeba_hq import CelebaHQ
from pipeline.data.sources.folder.source import ImagesWithTable
from pipeline.data.sources.parquet import Parquet
from pipeline.data.sources.tars.places import is_pattern
from pipeline.data.sources.tars.source import Tars
from pipeline.data.sources.toy.source import ToyFaces
from pipeline.errors import DataError
from pipeline.rundir import layout

# A folder is of the first kind that recognises it.
SOURCES: dict[str, type[Source]] = {
    "celeba": Celeba,
    "celeba_hq": CelebaHQ,
    "parquet": Parquet,
    "webdataset": Tars,
    "images+csv": ImagesWithTable,
    "toy": ToyFaces,  # drawn by the project itself if shard.source is empty
}

_LABEL_FILES = {
    FACTS, *ATTRIBUTES_FILES, *PARTITION_FILES, *celeba_hq.ATTRIBUTES_FILES, *celeba_hq.MAPPING_FILES
}  # fmt: skip


def recognise(place: str | Path, name: str = "") -> type[Source]:
    """Return the kind of data set at a path or URL: the one called `name`, or the first that recognises it.

    Raises DataError if it is none of SOURCES.
    """
    folder = Path(place)
    if name and not is_pattern(str(place)) and not folder.is_dir():
        expected = SOURCES[name].expects
        raise DataError(f"{folder}: no such folder; shard.source must name one that holds {expected}")
    if name:
        return SOURCES[name]
    if is_pattern(str(place)):
        return Tars
    for kind in SOURCES.values():
        if kind.recognises(folder):
            return kind
    expected = " | ".join(kind.expects for kind in SOURCES.values() if kind.expects)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; shard.source must name one that holds {expected}")
    raise DataError(f"{folder}: holds no data set that is known here; expected {expected}")


def open_source(place: str | Path, settings: ShardConfig) -> Source:
    """Open the data set at a path or URL, whatever its kind. Raises DataError."""
    kind = recognise(place, settings.source_kind)
    if issubclass(kind, Tars):
        return kind.open_all(str(place), settings.allow_pipe)
    return kind.open(Path(place), settings.allow_subset)


def changed_labels(config: RunConfig) -> str:
    """Return a warning if labels in the source's folder are newer than its finished shards, else "".

    Shards are found by their settings, so they stay as they are. Images are too many to look at.
    """
    if not config.shard.source or config.data.shards or is_remote(config.shard.source):
        return ""
    shards = layout.shards_dir(config)
    made = (shards / layout.MANIFEST).stat().st_mtime_ns
    for path, depth in walk(layout.source_path(config)):
        if _holds_labels(path, depth) and path.is_file() and path.stat().st_mtime_ns > made:
            return f"{path}: is newer than the shards in {shards}; delete that folder to convert again"
    return ""


def _holds_labels(path: Path, depth: int) -> bool:
    """Return whether a file has labels or facts, by its name and its depth below the source."""
    if path.name.startswith("."):
        return False
    is_table = path.suffix.lower() == ".csv" and depth == 0
    return path.name in _LABEL_FILES or is_table or (path.suffix == ".parquet" and depth <= 1)

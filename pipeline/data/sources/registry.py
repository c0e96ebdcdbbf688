"""The kinds of data set. A new kind is a file beside this one and its line in SOURCES."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import ShardConfig
from pipeline.data.sources.base import Source
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.folder.celeba_hq import CelebaHQ
from pipeline.data.sources.folder.source import ImagesWithTable
from pipeline.data.sources.parquet import Parquet
from pipeline.data.sources.tars.places import is_pattern
from pipeline.data.sources.tars.source import Tars
from pipeline.data.sources.toy.source import ToyFaces
from pipeline.errors import DataError

# A folder is of the first kind that recognises it.
SOURCES: dict[str, type[Source]] = {
    "celeba": Celeba,
    "celeba_hq": CelebaHQ,
    "parquet": Parquet,
    "webdataset": Tars,
    "images+csv": ImagesWithTable,
    "toy": ToyFaces,  # drawn by the project itself if shard.source is empty
}


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

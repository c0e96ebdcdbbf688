"""The kinds of data set. A new kind is a file beside this one and its line in SOURCES."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.sources.base import Source
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.toy.source import ToyFaces
from pipeline.errors import DataError

SOURCES: dict[str, type[Source]] = {
    "celeba": Celeba,
    "toy": ToyFaces,  # drawn by the project itself if shard.source is empty
}


def recognise(folder: Path) -> type[Source]:
    """Return the kind of data set that `folder` holds. Raises DataError if it is none of SOURCES."""
    for kind in SOURCES.values():
        if kind.recognises(folder):
            return kind
    expected = " | ".join(kind.expects for kind in SOURCES.values() if kind.expects)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; shard.source must name one that holds {expected}")
    raise DataError(f"{folder}: holds no data set that is known here; expected {expected}")


def open_source(folder: Path, allow_subset: bool) -> Source:
    """Open the data set in `folder`, whatever its kind. Raises DataError."""
    return recognise(folder).open(folder, allow_subset)

"""The index beside an encoded tar: the place, label and key of each image.

It is one safetensors file with some hundred bytes for each image. A reader needs no other part of the
tar to find an image.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from pipeline.data.manifest import MEND
from pipeline.errors import DataError
from pipeline.rundir.files import write_bytes
from pipeline.rundir.layout import MANIFEST

ENDING = ".index.safetensors"


class Index(NamedTuple):
    """The images of one tar, in the order of their samples."""

    offsets: np.ndarray  # int64 [n], first byte of the image file in the tar
    lengths: np.ndarray  # int64 [n], bytes
    labels: np.ndarray  # uint8 [n, A], 0 or 1
    keys: list[str]


def index_file(tar: Path) -> Path:
    """Return the place of a tar's index."""
    return tar.with_name(tar.name.removesuffix(".tar") + ENDING)


def write_index(file: Path, index: Index) -> str:
    """Write an index and return its sha256."""
    text = "\n".join(index.keys).encode()
    tensors: dict[str, np.ndarray] = {
        "offsets": np.ascontiguousarray(index.offsets, np.int64),
        "lengths": np.ascontiguousarray(index.lengths, np.int64),
        "labels": np.ascontiguousarray(index.labels, np.uint8),
        "keys": np.frombuffer(text, np.uint8).copy(),
    }
    content = safetensors.numpy.save(tensors)
    write_bytes(file, content)
    return hashlib.sha256(content).hexdigest()


def read_index(folder: Path, entry: dict[str, Any], attributes: int) -> Index:
    """Read and verify the index of the tar of a manifest entry. Raises DataError."""
    file = index_file(folder / entry["file"])
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {MEND}") from None
    if hashlib.sha256(content).hexdigest() != entry["index"]:
        raise DataError(f"{file}: its sha256 differs from {MANIFEST}, so its content is damaged; {MEND}")
    tensors = safetensors.numpy.load(content)
    keys = tensors["keys"].tobytes().decode().split("\n")
    index = Index(tensors["offsets"], tensors["lengths"], tensors["labels"], keys)
    n = entry["samples"]
    shapes = [index.offsets.shape, index.lengths.shape, index.labels.shape]
    ends = index.offsets + index.lengths
    if shapes != [(n,), (n,), (n, attributes)] or len(keys) != n or ends.max() > entry["bytes"]:
        raise DataError(f"{file}: does not fit its tar as {MANIFEST} describes it; {MEND}")
    return index

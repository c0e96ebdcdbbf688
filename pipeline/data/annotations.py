"""annotations.safetensors beside the shards: the labels of all annotated images, also of those not there.

Evaluation counts rare combinations in them, so it needs neither the source nor its format.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from pipeline.data.manifest import MEND
from pipeline.data.sources.base import Annotations
from pipeline.data.sources.celeba import read_celeba_annotations
from pipeline.errors import DataError
from pipeline.rundir.files import write_bytes

ANNOTATIONS = "annotations.safetensors"


def write_annotations(folder: Path, annotations: Annotations) -> dict[str, Any]:
    """Write the file and return its entry for the manifest."""
    content = safetensors.numpy.save({"labels": annotations.labels, "splits": annotations.splits})
    write_bytes(folder / ANNOTATIONS, content)
    return {"file": ANNOTATIONS, "sha256": hashlib.sha256(content).hexdigest()}


def read_annotations(folder: Path, manifest: dict[str, Any], source: Path) -> Annotations:
    """Read and verify the labels of all annotated images, whose order is that of their keys.

    An older manifest lists no such file; its shards are CelebA's, so they are read from `source`.
    Raises DataError if they are out of reach, damaged, or not those that the shards were made from.
    """
    if "annotations" not in manifest:
        return _of_older_shards(manifest, source)
    file = folder / ANNOTATIONS
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {MEND}") from None
    if hashlib.sha256(content).hexdigest() != manifest["annotations"]["sha256"]:
        raise DataError(f"{file}: its sha256 differs from the manifest, so its content is damaged; {MEND}")
    tensors = safetensors.numpy.load(content)
    return Annotations(tensors["labels"], tensors["splits"])


def _of_older_shards(manifest: dict[str, Any], source: Path) -> Annotations:
    annotations, digests = read_celeba_annotations(source)
    if not digests.items() <= manifest.get("source", {}).items():
        raise DataError(f"{source}: its annotations are not those that the shards were made from")
    return annotations

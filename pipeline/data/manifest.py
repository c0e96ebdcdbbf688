"""manifest.json: what a folder of shards holds.

The shard stage writes it last, and every reader begins with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import ShardConfig
from pipeline.data.journal import ShardReport
from pipeline.data.sources.base import SPLITS, DatasetInfo, Source
from pipeline.data.sources.celeba_names import CELEBA_CROP, CELEBA_INFO
from pipeline.errors import DataError
from pipeline.rundir.files import intact, seal
from pipeline.rundir.layout import MANIFEST, SHARD_FORMAT

MAX_SIZE = 4096  # pixels
LISTED_SKIPS = 100  # damaged images that the manifest names; the others are only counted
MEND = f"delete it and {MANIFEST} beside it, then run the shard stage again (intact shards are kept)"
log = logging.getLogger("cvae.shards")
_FILE = re.compile(r"(train|val|test)-\d{5}\.tar")


def entries_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all shards, in the manifest's order."""
    return [entry for split in manifest["splits"].values() for entry in split["shards"]]


def content_digest(entries: list[dict[str, Any]]) -> str:
    """Return the sha256 over the lines `file sha256` of all shards, in the manifest's order."""
    lines = [f"{entry['file']} {entry['sha256']}\n" for entry in entries]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---- reading


def read_manifest(folder: Path, strangers: str = "refuse") -> dict[str, Any]:
    """Read and check the manifest of a folder of shards.

    Raises DataError if it is missing or malformed, or if the folder holds a tar that it does not list.
    With `strangers` "ignore", such a tar only causes a warning.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        form = manifest["format"]
        if form == SHARD_FORMAT:
            sound = _sound(manifest) and content_digest(entries_of(manifest)) == manifest["content_digest"]
            dataset_info(manifest)
            crop_of(manifest)
    except OSError:
        raise DataError(f"{file}: cannot be read; run the shard stage, which writes it last") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{file}: is damaged; delete it and run the shard stage again") from None
    again = "run the shard stage again"
    if form != SHARD_FORMAT:
        raise DataError(
            f"{file}: shards of format {form!r:.80}, expected {SHARD_FORMAT}; delete {folder} and {again}"
        )
    if not sound:
        raise DataError(
            f"{file}: is damaged (its content_digest does not fit its list of shards); delete it and {again}"
        )
    if not intact(manifest):
        raise DataError(f"{file}: is damaged (its digest does not fit its content); delete it and {again}")
    _look_for_strangers(folder, manifest, strangers)
    return manifest


def _look_for_strangers(folder: Path, manifest: dict[str, Any], strangers: str) -> None:
    listed = {entry["file"] for entry in entries_of(manifest)}
    there = {tar.name for tar in folder.glob("*.tar")}
    for stranger in sorted(there - listed):
        if strangers == "refuse":
            raise DataError(f"{folder / stranger}: is not listed in {MANIFEST}; remove it")
        log.warning("%s: is not listed in %s and is left alone", folder / stranger, MANIFEST)


def _sound(manifest: dict[str, Any]) -> bool:
    """Return whether every entry has the right form, belongs to its split, and is listed once."""
    files: list[str] = []
    for split, content in manifest["splits"].items():
        for entry in content["shards"]:
            if not _FILE.fullmatch(entry["file"]) or not entry["file"].startswith(f"{split}-"):
                return False
            for key in ("samples", "bytes"):
                if type(entry[key]) is not int or entry[key] <= 0:
                    return False
            if stored_as(manifest) == "encoded" and not isinstance(entry["index"], str):
                return False
            files.append(entry["file"])
    names = manifest["attributes"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return False
    if stored_as(manifest) not in ("strided", "encoded"):
        return False
    annotations = manifest.get("annotations", {"sha256": ""})
    if not isinstance(annotations["sha256"], str):
        return False
    size_fits = type(manifest["size"]) is int and 0 < manifest["size"] <= MAX_SIZE
    return size_fits and len(set(files)) == len(files)


def dataset_info(manifest: dict[str, Any]) -> DatasetInfo:
    """Return the facts about the data set. A manifest without them is older: its shards are CelebA's.

    Raises KeyError, TypeError or ValueError if they are malformed.
    """
    if "dataset" not in manifest:
        return CELEBA_INFO
    stored = manifest["dataset"]
    size = stored["native_size"]
    groups = {}
    for name in ("exclusive", "showcase"):
        groups[name] = tuple(_names(group) for group in stored[name])
    return DatasetInfo(
        name=str(stored["name"]),
        native_size=None if size is None else (int(size[0]), int(size[1])),
        exclusive=groups["exclusive"],
        showcase=groups["showcase"],
        swept=_names(stored["swept"]),
        contrast=_names(stored["contrast"]),
        crop=int(stored.get("crop", CELEBA_CROP)),  # once the default for every data set
    )


def _names(stored: Any) -> tuple[str, ...]:
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored):
        raise TypeError(f"expected a list of attribute names, got {stored!r:.80}")
    return tuple(stored)


def stored_as(manifest: dict[str, Any]) -> str:
    """Return `strided` or `encoded`. A manifest that does not say is older: its tars are strided."""
    return str(manifest.get("stored_as", "strided"))


def crop_of(manifest: dict[str, Any]) -> int:
    """Return the side of the square that was cut from each image, pixels; 0: the largest square."""
    return int(manifest.get("crop", CELEBA_CROP))


# ---- writing


def build_manifest(
    source: Source, config: ShardConfig, reports: list[ShardReport], annotations: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest of finished shards; `annotations` is the entry of their annotations' file.

    Nothing in it depends on where the source lies or on how the shards were written.
    """
    reports = sorted(reports, key=lambda report: (SPLITS.index(report.file.split("-")[0]), report.file))
    splits = {split: _split_entry(split, reports) for split in SPLITS}
    skipped = sorted(skip for report in reports for skip in report.skipped)
    counts = {
        "annotated": len(source.annotated.splits),
        "present": len(source.keys),
        "skipped": len(skipped),
    }
    manifest = {
        "format": SHARD_FORMAT,
        "content_digest": content_digest(entries_of({"splits": splits})),
        "size": config.size,
        "crop": config.crop,
        "stored_as": config.stored_as,
        "seed": config.seed,
        "attributes": list(source.attributes),
        "dataset": asdict(source.info),
        "annotations": annotations,
        "source": source.fingerprint,
        "counts": counts,
        "skipped": skipped[:LISTED_SKIPS],
        "splits": splits,
    }
    return seal(manifest)


def _split_entry(split: str, reports: list[ShardReport]) -> dict[str, Any]:
    own = [report for report in reports if report.file.startswith(f"{split}-")]
    return {
        "samples": sum(report.samples for report in own),
        "label_counts": np.sum([report.label_counts for report in own], 0).tolist(),
        "shards": [_shard_entry(report) for report in own],
    }


def _shard_entry(report: ShardReport) -> dict[str, Any]:
    entry = {
        "file": report.file,
        "samples": report.samples,
        "bytes": report.bytes,
        "sha256": report.sha256,
    }
    return entry | {"index": report.index} if report.index else entry

"""Labels in tars -> attributes: a JSON object of names, a vector (.npy), or the number of a class (.cls)."""

from __future__ import annotations

import io
import json
import logging
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.sources.dataset import SPLIT_COLUMNS, require_attribute_names, split_of
from pipeline.data.sources.tars.index import Sample
from pipeline.data.sources.tars.places import Tar
from pipeline.errors import DataError

MOST_CLASSES = 1000
MOST_ATTRIBUTES = 10_000
_BINARY = (0, 1, -1)
log = logging.getLogger("cvae.shards")


class Labels(NamedTuple):
    """The labels of all samples."""

    attributes: tuple[str, ...]
    values: np.ndarray  # uint8 [N, A]
    splits: list[int | None]  # of JSON labels that name one
    classes: bool  # whether the attributes exclude one another


def read_labels(samples: list[tuple[Tar, Sample]]) -> Labels:
    """Read the labels of all samples, which must be of one form. Raises DataError that names the sample."""
    first_tar, first = samples[0]
    for tar, sample in samples:
        if sample.form != first.form:
            raise _wrong(tar, sample, f"is .{sample.form}, but the first one is .{first.form}")
    if first.form == "json":
        return _from_json(samples)
    if first.form == "npy":
        return _from_vectors(samples)
    return _from_classes(samples)


def _wrong(tar: Tar, sample: Sample, reason: str) -> DataError:
    return DataError(f"{tar.url}: the label of sample {sample.key!r:.100} {reason}")


# ---- JSON


def _from_json(samples: list[tuple[Tar, Sample]]) -> Labels:
    trees = [_tree(tar, sample) for tar, sample in samples]
    names = _binary_names(samples[0][0], trees)
    require_attribute_names(f"{samples[0][0].url}: sample {samples[0][1].key!r:.100}", names)
    values = np.zeros((len(samples), len(names)), np.int8)
    splits: list[int | None] = []
    for row, ((tar, sample), tree) in enumerate(zip(samples, trees, strict=True)):
        found = _attributes_in(tree)
        for column, name in enumerate(names):
            if name not in found:
                raise _wrong(tar, sample, f"has no key {name!r}, unlike others; add it, or remove it there")
            values[row, column] = int(found[name])
        splits.append(_split(tar, sample, tree))
    return Labels(tuple(names), _to_bits(samples, values), splits, False)


def _binary_names(first: Tar, trees: list[dict[str, Any]]) -> list[str]:
    """Return the keys whose values are binary in every sample that has them. A warning names the others."""
    strange: dict[str, str | None] = {}  # key -> its first value that is not binary, or None
    for tree in trees:
        for name, value in _attributes_in(tree).items():
            if strange.get(name) is None:
                strange[name] = None if _is_binary(value) else repr(value)
    known = {name: value for name, value in strange.items() if name not in SPLIT_COLUMNS}
    others = [f"{name} ({value:.40})" for name, value in known.items() if value is not None]
    if others:
        log.warning("%s: not binary, so no attributes: %s", first.url, ", ".join(others)[:200])
    return [name for name, value in known.items() if value is None]


def _tree(tar: Tar, sample: Sample) -> dict[str, Any]:
    try:
        tree = json.loads(sample.label)
    except (ValueError, RecursionError):
        raise _wrong(tar, sample, "is no JSON") from None
    if not isinstance(tree, dict):
        raise _wrong(tar, sample, f"is a JSON {type(tree).__name__}, expected an object of names and values")
    return tree


def _attributes_in(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the object that holds the attributes: the one called so, or the whole."""
    inner = tree.get("attributes")
    return inner if isinstance(inner, dict) else tree


def _is_binary(value: Any) -> bool:
    return isinstance(value, bool | int) and value in _BINARY


def _split(tar: Tar, sample: Sample, tree: dict[str, Any]) -> int | None:
    for name in SPLIT_COLUMNS:
        if name in tree:
            split = split_of(str(tree[name]))
            if split is None:
                raise _wrong(tar, sample, f"has {name} = {tree[name]!r:.60}, expected train, val or test")
            return split
    return None


# ---- vectors and classes


def _from_vectors(samples: list[tuple[Tar, Sample]]) -> Labels:
    vectors = [_vector(tar, sample) for tar, sample in samples]
    width = len(vectors[0])
    for (tar, sample), vector in zip(samples, vectors, strict=True):
        if len(vector) != width:
            raise _wrong(tar, sample, f"has {len(vector)} values, but the first one has {width}")
    names = tuple(f"attribute_{number:0{len(str(width - 1))}d}" for number in range(width))
    return Labels(names, _to_bits(samples, np.stack(vectors)), [None] * len(samples), False)


def _vector(tar: Tar, sample: Sample) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(sample.label), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError):
        raise _wrong(tar, sample, "is no .npy array of numbers (pickled objects are never loaded)") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or not 0 < array.size <= MOST_ATTRIBUTES:
        raise _wrong(tar, sample, "is no vector of attributes")
    if array.dtype.kind not in "bui f" or not np.isin(array, _BINARY).all():
        raise _wrong(tar, sample, "holds other values than 0 and 1, or -1 and 1")
    return array.astype(np.int8)


def _from_classes(samples: list[tuple[Tar, Sample]]) -> Labels:
    numbers = []
    for tar, sample in samples:
        text = sample.label.strip()
        if not text.isdigit() or int(text) >= MOST_CLASSES:
            raise _wrong(
                tar, sample, f"is {text[:40]!r}, expected the number of a class below {MOST_CLASSES}"
            )
        numbers.append(int(text))
    width = max(numbers) + 1
    names = tuple(f"class_{number:0{len(str(width - 1))}d}" for number in range(width))
    values = np.zeros((len(samples), width), np.uint8)
    values[np.arange(len(samples)), numbers] = 1
    return Labels(names, values, [None] * len(samples), True)


def _to_bits(samples: list[tuple[Tar, Sample]], values: np.ndarray) -> np.ndarray:
    """Return 1 where a value is 1. Raises DataError if both 0 and -1 stand for `no`."""
    if (values == 0).any() and (values == -1).any():
        row = int((values == -1).any(1).argmax())
        tar, sample = samples[row]
        raise _wrong(tar, sample, "holds -1, but others hold 0; use one of them for `no`")
    return (values == 1).astype(np.uint8)

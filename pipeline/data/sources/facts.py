"""dataset.yaml: what a data set says about itself, beside its images. The file is optional."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.sources.base import DatasetInfo
from pipeline.errors import DataError

FACTS = "dataset.yaml"
_GROUPS = ("exclusive", "showcase")  # lists of lists of attributes
_LISTS = ("swept", "contrast")  # lists of attributes
_KEYS = ("name", *_GROUPS, *_LISTS)


def with_own_facts(folder: Path, info: DatasetInfo, attributes: tuple[str, ...]) -> DatasetInfo:
    """Return the facts with those of dataset.yaml in `folder` in place of the usual ones.

    Raises DataError if the file is malformed or names an attribute that is not there.
    """
    file = folder / FACTS
    try:
        stored = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        return info
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(stored, dict):
        raise DataError(f"{file}: expected keys, got {type(stored).__name__}; allowed are {', '.join(_KEYS)}")
    own: dict[str, Any] = {}
    for key, value in stored.items():
        if key not in _KEYS:
            raise DataError(f"{file}: key {key!r:.80} is not known; allowed are {', '.join(_KEYS)}")
        own[key] = _value(file, key, value, attributes)
    return replace(info, **own)


def _value(file: Path, key: str, value: Any, attributes: tuple[str, ...]) -> Any:
    if key == "name":
        if not isinstance(value, str) or not value:
            raise DataError(f"{file}: key 'name': got {value!r:.80}, expected a word")
        return value
    if key in _LISTS:
        return _names(file, key, value, attributes)
    if not isinstance(value, list):
        raise DataError(f"{file}: key '{key}': got {value!r:.80}, expected a list of lists of attributes")
    return tuple(_names(file, key, group, attributes) for group in value)


def _names(file: Path, key: str, value: Any, attributes: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{file}: key '{key}': got {value!r:.80}, expected a list of attributes")
    for name in value:
        if name not in attributes:
            raise DataError(f"{file}: key '{key}': {name!r:.80} is no attribute of this data set")
    return tuple(value)

"""A sweep: variants x seeds from one YAML file, each a run; shards and classifier are shared, a table compares."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

KEYS = {"configs", "seeds", "grid", "overrides"}


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    config: str  # as --config takes it
    overrides: list[str]  # name, seed, grid values


def read_sweep(file: Path) -> list[Cell]:
    """The cells of a file with `configs`, `seeds`, and optionally `grid` (key: list of values) and `overrides` (key: value).

    Raises ConfigError that names the file and the key.
    """
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict) or not tree.get("configs") or not tree.keys() <= KEYS:
        raise ConfigError(
            f"{file}: expected the keys configs, seeds, and perhaps grid and overrides; got {tree if not tree else list(tree)}"
        )
    configs, seeds = (
        _items(file, tree, "configs"),
        _items(file, tree | {"seeds": tree.get("seeds", [0])}, "seeds"),
    )
    grid: dict[str, list[Any]] = {key: _items(file, tree["grid"], key) for key in tree.get("grid") or {}}
    common = [f"{key}={value}" for key, value in (tree.get("overrides") or {}).items()]
    cells = []
    for config, *values in itertools.product(configs, *grid.values()):
        chosen = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
        variant = "-".join(
            [
                Path(str(config)).stem,
                *(f"{key.rpartition('.')[2]}{value}" for key, value in zip(grid, values, strict=True)),
            ]
        )
        cells += [
            Cell(str(config), [*common, *chosen, f"seed={seed}", f"name={variant}-s{seed}"]) for seed in seeds
        ]
    return cells


def _items(file: Path, tree: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(tree[key], list) or not tree[key]:
        raise ConfigError(f"{file}: key '{key}': got {tree[key]!r}, expected a list, e.g. [0, 1, 2]")
    return tree[key]

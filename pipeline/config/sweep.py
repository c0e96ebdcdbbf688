"""A sweep: variants x seeds from one YAML file. Each cell is one run."""

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
    overrides: list[str]  # name, seed and grid values


def read_sweep(file: Path) -> list[Cell]:
    """Return the cells of a sweep file: every configuration x every grid point x every seed.

    The file has the keys `configs`, `seeds`, and optionally `grid` (key: list of values) and
    `overrides` (key: value). Raises ConfigError that names the file and the key.
    """
    tree = _read_tree(file)
    seeds = _items(file, {"seeds": [0], **tree}, "seeds")
    grid = {key: _items(file, tree["grid"], key) for key in tree.get("grid") or {}}
    common = [f"{key}={value}" for key, value in (tree.get("overrides") or {}).items()]
    cells = []
    for config, *values in itertools.product(_items(file, tree, "configs"), *grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        settings = [f"{key}={value}" for key, value in chosen.items()]
        short = [f"{key.rpartition('.')[2]}{value}" for key, value in chosen.items()]
        variant = "-".join([Path(str(config)).stem, *short])
        for seed in seeds:
            own = [f"seed={seed}", f"name={variant}-s{seed}"]
            cells.append(Cell(str(config), [*common, *settings, *own]))
    return cells


def _read_tree(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{file}: cannot be read as YAML: {reason}") from None
    if not isinstance(tree, dict) or not tree.get("configs") or not tree.keys() <= KEYS:
        found = list(tree) if isinstance(tree, dict) else tree
        raise ConfigError(
            f"{file}: expected the keys configs and seeds, and optionally grid and overrides; got {found}"
        )
    return tree


def _items(file: Path, tree: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(tree[key], list) or not tree[key]:
        raise ConfigError(f"{file}: key '{key}': got {tree[key]!r}, expected a list, e.g. [0, 1, 2]")
    return tree[key]

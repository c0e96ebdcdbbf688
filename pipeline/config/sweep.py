"""A sweep: variants x seeds from one YAML file. Each cell is one run."""

from __future__ import annotations

import itertools
import json
import re
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
    common: list[str]  # overrides of every run; the command line wins over them
    own: list[str]  # grid values, seed and name of this run; they win over the command line


def read_sweep(file: Path) -> list[Cell]:
    """Return the cells of a sweep file: every configuration x every grid point x every seed.

    The file has the keys `configs`, `seeds`, and optionally `grid` (key: list of values) and
    `overrides` (key: value). Raises ConfigError that names the file and the key.
    """
    tree = _read_tree(file)
    seeds = _items(file, {"seeds": [0], **tree}, "seeds")
    points = _mapping(file, tree, "grid")
    grid = {key: _items(file, points, key) for key in points}
    common = [_override(key, value) for key, value in _mapping(file, tree, "overrides").items()]
    cells = []
    for config, *values in itertools.product(_items(file, tree, "configs"), *grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        settings = [_override(key, value) for key, value in chosen.items()]
        short = [f"{key.rpartition('.')[2]}{_in_a_name(value)}" for key, value in chosen.items()]
        variant = "-".join([Path(str(config)).stem, *short])
        for seed in seeds:
            own = [*settings, f"seed={seed}", f"name={variant}-s{seed}"]
            cells.append(Cell(str(config), common, own))
    return cells


def with_command_line(cell: Cell, given: list[str], file: Path) -> list[str]:
    """Return the overrides of a cell in the order in which they hold; the last one wins.

    Raises ConfigError if the command line sets what tells the runs of the sweep apart.
    """
    decided = {word.partition("=")[0] for word in cell.own}
    for word in given:
        key = word.partition("=")[0]
        if key in decided:
            raise ConfigError(
                f"override {word!r}: the sweep {file} sets '{key}' itself for each run; change it in the file"
            )
    return [*cell.common, *given, *cell.own]


def _override(key: str, value: Any) -> str:
    """Write one setting as the command line does; JSON is YAML, so null and lists keep their meaning."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _in_a_name(value: Any) -> str:
    return re.sub(r"[^\w.]+", "_", str(value)).strip("_")


def _mapping(file: Path, tree: dict[str, Any], key: str) -> dict[str, Any]:
    found = tree.get(key) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: key '{key}': got {found!r}, expected keys with values")
    return found


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

"""Old names of keys, so that old YAML files, runs and checkpoints stay readable."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.errors import ConfigError

log = logging.getLogger("cvae.config")

RENAMED = {  # old key: new key, both in full
    "train.checkpoint_interval": "train.max_lost_steps",
}
# Earlier runs recorded exactly these keys for a stage; null meant "not given", and now means "the default".
OLD_STAGE_KEYS = {
    "partition", "account", "qos", "constraint", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task",
    "mem_gb", "timeout_min", "jobs",
}  # fmt: skip
_told: set[str] = set()  # a process mentions each old key once


def with_new_names(tree: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the nested dictionary `tree` with every old key under its new name; `tree` stays as it is.

    `origin` names the file or override that the keys come from. Raises ConfigError if `tree` has both names.
    """
    new_tree = _copy(tree)
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        parent = _section(new_tree, section)
        if parent is None or name not in parent:
            continue
        value = parent.pop(name)
        new_section, _, new_name = new.rpartition(".")
        target = _make_section(new_tree, new_section)
        if new_name in target:
            raise ConfigError(f"{origin}: key '{old}' is the old name of '{new}'; remove one of them")
        target[new_name] = value
        _tell_once(old, new, origin)
    for own in (_section(new_tree, "cluster.stages") or {}).values():
        if isinstance(own, dict) and own.keys() == OLD_STAGE_KEYS:
            for key in [key for key, value in own.items() if value is None]:
                del own[key]
    return new_tree


def _tell_once(old: str, new: str, origin: str) -> None:
    if old not in _told:
        log.warning("%s: key '%s' is now called '%s'; the old name still works", origin, old, new)
    _told.add(old)


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    copy = {}
    for key, value in tree.items():
        copy[key] = _copy(value) if isinstance(value, dict) else value
    return copy


def _section(tree: dict[str, Any], path: str) -> dict[str, Any] | None:
    node: Any = tree
    for name in filter(None, path.split(".")):
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _make_section(tree: dict[str, Any], path: str) -> dict[str, Any]:
    node = tree
    for name in filter(None, path.split(".")):
        node = node.setdefault(name, {})
    return node

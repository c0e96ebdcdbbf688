"""Load a configuration: dataclass defaults < YAML files < `a.b=value` overrides. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from pipeline.config.schema import AT_LEAST_ONE, CHOICES, ClusterConfig, RunConfig, StageResources
from pipeline.config.suggest import suggest
from pipeline.errors import ConfigError

MAX_DEPTH = 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
OmegaConf.clear_resolver(
    "oc.env"
)  # a configuration from others must not read the environment, where secrets are


def load(files: list[Path], overrides: list[str] | None = None, base: RunConfig | None = None) -> RunConfig:
    """Merge YAML `files` in order, then `a.b=value` overrides, over `base` (the defaults).

    Raises ConfigError that names the file or override, the key, and the nearest valid key or the wanted type.
    """
    config = OmegaConf.structured(base or RunConfig)
    for file in files:
        for origin, delta in _with_bases(file):
            config = _merge(config, delta, str(origin))
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, e.g. train.batch_size=256")
        _refuse_tricks(override.partition("=")[2], f"override {override[:80]!r}")
        try:
            delta = OmegaConf.from_dotlist([override])
        except Exception as error:  # yaml errors of the value
            raise ConfigError(f"override {override!r}: {_first_line(error)}") from None
        config = _merge(config, delta, f"override {override!r}")
    try:
        resolved: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    _check(resolved)
    return resolved


def _with_bases(file: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, DictConfig]]:
    """A file after those that its `base: NAME` names (NAME.yaml beside it), each with its content."""
    delta = _read_yaml(file)
    base = delta.pop("base", None)
    if base is None:
        return [(file, delta)]
    if not isinstance(base, str) or not _NAME.fullmatch(base):
        raise ConfigError(
            f"{file}: `base:` is {str(base)[:80]!r}, expected the name of a .yaml file beside it"
        )
    if file in seen:
        raise ConfigError(f"{file}: its `base:` leads back to itself")
    return [*_with_bases(file.parent / f"{base}.yaml", (*seen, file)), (file, delta)]


def _read_yaml(file: Path) -> DictConfig:
    try:
        text = file.read_text()
        _refuse_tricks(text, str(file))
        delta = OmegaConf.load(StringIO(text))
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file{_nearest_file(file)}") from None
    except Exception as error:
        raise ConfigError(f"{file}: not a valid YAML file: {_first_line(error)}") from None
    if not isinstance(delta, DictConfig):
        raise ConfigError(
            f"{file}: expected `key: value` lines at the top level, found a list or a single value"
        )
    return delta


def _refuse_tricks(text: str, origin: str) -> None:
    """Raise ConfigError for what YAML allows and no configuration needs: aliases (a few lines of them fill the memory) and deep nesting."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise ConfigError(
                    f"{origin}: YAML aliases (*name) and more than {MAX_DEPTH} levels are not accepted; write the value out"
                )
    except yaml.YAMLError:
        return  # said better where it is loaded


def _merge(config: DictConfig, delta: DictConfig, origin: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(config, delta)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ConfigError(
            f"{origin}: unknown key '{error.full_key}'{_nearest_key(str(error.full_key))}"
        ) from None
    except (
        OmegaConfBaseException,
        TypeError,
    ) as error:  # TypeError: a section where a value is expected, or the reverse
        key = getattr(error, "full_key", None)
        where = f"key '{key}': " if key else ""
        raise ConfigError(f"{origin}: {where}{_first_line(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nearest_file(file: Path) -> str:
    there = [p.stem for p in file.parent.glob("*.yaml")]
    listed = ", ".join(sorted(there)) or "none"
    return suggest(file.stem, there) or f"; there are: {listed}"


def _nearest_key(key: str) -> str:
    known = leaves(to_dict(RunConfig()))
    return suggest(key, known) or "; `launch.py --dry-run` prints all keys"


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to {'a.b': value}, sections included as keys of their own."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat[prefix + key] = value
        if isinstance(value, dict):
            flat |= leaves(value, f"{prefix}{key}.")
    return flat


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every leaf of the configuration as {'train.batch_size': 128, ...}."""
    return {k: v for k, v in leaves(to_dict(config)).items() if not isinstance(v, dict)}


def _check(config: RunConfig) -> None:
    values = flatten(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            hint = suggest(str(values[key]), choices)
            raise ConfigError(f"key '{key}': got {values[key]!r}, expected one of {', '.join(choices)}{hint}")
    for key in AT_LEAST_ONE:
        if values[key] < 1:
            raise ConfigError(f"key '{key}': got {values[key]}, expected at least 1")
    if (
        not config.name
        or not all(c.isalnum() or c in "._-" for c in config.name)
        or config.name.startswith(".")
    ):
        raise ConfigError(f"key 'name': got {config.name!r}, expected letters, digits, '.', '_' and '-'")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, readable by `load`."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def digest(parts: Any) -> str:
    """First 12 hex digits of the sha256 of `parts` (dictionaries, lists, scalars) as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def resources(cluster: ClusterConfig, stage: str) -> ClusterConfig:
    """The cluster's settings as they hold for one stage."""
    own = cluster.stages.get(stage, StageResources())
    given = {k: v for k, v in dataclasses.asdict(own).items() if v is not None}
    return dataclasses.replace(cluster, **given)

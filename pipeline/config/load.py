"""Load a configuration: dataclass defaults < YAML files < `a.b=value` overrides. Imports no torch."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from pipeline.config.limits import require_in_range
from pipeline.config.renamed import with_new_names
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.config.suggest import suggest
from pipeline.errors import ConfigError

MAX_DEPTH = 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_RUN_NAME = re.compile(r"[\w-][\w.-]*")
# Secrets are in the environment, so a configuration from others must not read it.
OmegaConf.clear_resolver("oc.env")


def load(files: list[Path], overrides: list[str] | None = None, base: RunConfig | None = None) -> RunConfig:
    """Merge YAML `files` in order, then `a.b=value` overrides, over `base` (the defaults).

    Raises ConfigError that names the file or override, the key, and the nearest valid key or the wanted type.
    """
    config = _structured(base or RunConfig())
    for file in files:
        for origin, delta in _with_bases(file):
            config = _merge(config, delta, str(origin))
    for override in overrides or []:
        config = _merge(config, _read_override(override), f"override {override!r}")
    return _checked(config)


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Return a copy of `config` with the values {'a.b': value}, of the right types. Raises ConfigError."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    _check(config)
    return config


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    """Return a copy of the dataclass `section` with another value at the key `path`."""
    name, *rest = path
    return dataclasses.replace(
        section, **{name: _replaced(getattr(section, name), rest, value) if rest else value}
    )


def _structured(config: RunConfig) -> DictConfig:
    typed = copy.deepcopy(_defaults())
    if config == RunConfig():
        return typed
    merged = OmegaConf.unsafe_merge(typed, _as_written(to_dict(config)))
    assert isinstance(merged, DictConfig)
    return merged


@cache
def _defaults() -> DictConfig:
    typed: DictConfig = OmegaConf.structured(RunConfig)
    return typed


def _checked(config: DictConfig) -> RunConfig:
    try:
        resolved: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    _check(resolved)
    return resolved


def _read_override(override: str) -> DictConfig:
    """Parse one `a.b=value`; raises ConfigError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, e.g. train.batch_size=256")
    _refuse_tricks(value, f"override {override[:80]!r}")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # the value is not valid YAML
        raise ConfigError(f"override {override!r}: {_first_line(error)}") from None


def _with_bases(file: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, DictConfig]]:
    """Return the contents of `file` and, before it, of the files that its `base: NAME` leads to.

    NAME stands for NAME.yaml in the same folder.
    """
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
    """Raise ConfigError for YAML that no configuration needs: aliases and deep nesting.

    A few lines of aliases can fill the memory.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise ConfigError(
                    f"{origin}: YAML aliases (*name) and more than {MAX_DEPTH} levels are not accepted; "
                    "write the value out"
                )
    except yaml.YAMLError:
        return  # the loader that follows reports it with a better message


def _merge(config: DictConfig, delta: DictConfig | dict[str, Any], origin: str) -> DictConfig:
    try:
        given = OmegaConf.to_container(delta) if isinstance(delta, DictConfig) else delta
        tree = with_new_names(given, origin)  # type: ignore[arg-type]
        # A copy of every key for each override would take most of the time: `config` is not used again.
        merged = OmegaConf.unsafe_merge(config, _as_written(tree))
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)
        raise ConfigError(f"{origin}: unknown key '{key}'{_nearest_key(key)}") from None
    except (OmegaConfBaseException, TypeError) as error:
        # A TypeError means a section in place of a value, or the reverse.
        key = getattr(error, "full_key", None) or ""
        where = f"key '{key}': " if key else ""
        raise ConfigError(f"{origin}: {where}{_first_line(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _as_written(value: Any) -> Any:
    """Return `value` with every "${" in it escaped: it is a shell variable here, not another key's value."""
    if isinstance(value, dict):
        return {key: _as_written(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_written(each) for each in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
    """Return every value of the configuration as {'train.batch_size': 128, ...}."""
    return {key: value for key, value in leaves(to_dict(config)).items() if not isinstance(value, dict)}


def _check(config: RunConfig) -> None:
    """Raise ConfigError that names the first key whose value is out of range."""
    values = flatten(config)
    require_in_range(values)
    doubled = {name for name in config.data.attributes if config.data.attributes.count(name) > 1}
    if doubled:
        raise ConfigError(f"key 'data.attributes': names {', '.join(sorted(doubled))} twice")
    if config.shard.background != "keep" and config.shard.stored_as == "encoded":
        raise ConfigError(
            f"key 'shard.background': got {config.shard.background}, expected keep: encoded shards hold the "
            "image files as they are; set shard.format=strided"
        )
    for stage in config.cluster.stages:
        resources(config.cluster, stage)
    if not _RUN_NAME.fullmatch(config.name):
        raise ConfigError(f"key 'name': got {config.name!r}, expected letters, digits, '.', '_' and '-'")
    _check_control(config)


def _check_control(config: RunConfig) -> None:
    """Raise ConfigError unless each part of the attribute control is fitted by the stage that fits it."""
    for section, prior in (("model", config.model.prior), ("refine", config.refine.prior)):
        if prior.reader:
            raise ConfigError(
                f"key '{section}.prior.reader': got {prior.reader}, expected 0: the stage `steer` sets it;"
                " set steer.images and steer.width"
            )
    if config.steer.images and not (config.refine.images and config.refine.prior.control):
        raise ConfigError(
            f"key 'steer.images': got {config.steer.images}, expected 0, because steering continues a control"
            " that the stage `refine` fits; set refine.images and refine.prior.control=true"
        )
    for name in ("control", "anomaly"):
        if getattr(config.model.prior, name):
            raise ConfigError(
                f"key 'model.prior.{name}': got true, but only the stage `refine` fits it;"
                f" set refine.prior.{name}=true"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, readable by `load`."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def digest(parts: Any) -> str:
    """Return the first 12 hex digits of the sha256 of `parts` as canonical JSON.

    `parts` are dictionaries, lists and scalars.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def resources(cluster: ClusterConfig, stage: str) -> ClusterConfig:
    """Return the cluster's settings as they hold for one stage.

    A key under `cluster.stages.STAGE` replaces the cluster's value; null restores the key's default.
    Options in `extra_sbatch` are merged one by one. Raises ConfigError for an unknown key or a wrong type.
    """
    own = cluster.stages.get(stage) or {}
    where = f"key 'cluster.stages.{stage}'"
    if not isinstance(own, dict):
        raise ConfigError(f"{where}: got {own!r}, expected keys of `cluster`, e.g. {{timeout_min: 240}}")
    fresh = ClusterConfig()
    allowed = [key for key in dataclasses.asdict(fresh) if key not in ("executor", "stages")]
    for key in own:
        if key not in allowed:
            hint = suggest(str(key), allowed) or f", expected one of {', '.join(allowed)}"
            raise ConfigError(f"{where}: unknown key '{key}'{hint}")
    removed = {key: getattr(fresh, key) for key, value in own.items() if value is None}
    base = dataclasses.replace(cluster, **{**removed, "stages": {}})
    given = {key: value for key, value in own.items() if key not in removed}
    if not given:
        return base
    typed: ClusterConfig = OmegaConf.to_object(  # type: ignore[assignment]
        _merge(copy.deepcopy(_cluster_defaults()), OmegaConf.create(given), where)
    )
    own = {key: getattr(typed, key) for key in given}
    if "extra_sbatch" in own:
        own["extra_sbatch"] = {**base.extra_sbatch, **own["extra_sbatch"]}
    return dataclasses.replace(base, **own)


@cache
def _cluster_defaults() -> DictConfig:
    typed: DictConfig = OmegaConf.structured(ClusterConfig)
    return typed

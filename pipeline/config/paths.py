"""Path keys of a configuration: `~` and `$VARIABLES` expanded, absolute, so that a job may start anywhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from pipeline.config.load import flatten, with_values
from pipeline.config.schema import PATH_KEYS, RunConfig
from pipeline.errors import ConfigError

SQLITE = "sqlite:///"
WEIGHTS_VARIABLE = "CVAE_INCEPTION_WEIGHTS"  # gives eval.inception_weights if that key is empty
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_SHELL_ONLY = re.compile(r"\$[({$]|`")  # ${A:-b}, $(command): no shell reads a configuration
_REMOTE = re.compile(r"pipe:|[a-z0-9+]+://")
_AFTER_A_TAR = re.compile(r"(?<=\.tar)::")
_SECRET = re.compile(r"token|secret|passw|credential|key", re.IGNORECASE)


def absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with every key of PATH_KEYS as an absolute path; empty ones stay empty.

    Raises ConfigError that names the key if a variable or a user's home is unknown, or if only a shell
    could expand the path.
    """
    values = flatten(config)
    paths = {key: values[key] for key in PATH_KEYS}
    paths["eval.inception_weights"] = paths["eval.inception_weights"] or os.environ.get(WEIGHTS_VARIABLE, "")
    absolute = {key: absolute_path(key, path) for key, path in paths.items()}
    tars = [absolute_path("shard.source", tar) for tar in tar_patterns(paths["shard.source"])]
    absolute["shard.source"] = "::".join(tars)
    return with_values(config, absolute)


def absolute_path(key: str, path: str) -> str:
    """Return the value `path` of `key` with `~` and `$VARIABLES` expanded, absolute; URLs stay as they are.

    Raises ConfigError.
    """
    if not path or is_remote(path):
        return path
    if os.path.isabs(path) and os.path.exists(path):
        return path  # a folder may have a $ in its name
    if _SHELL_ONLY.search(_VARIABLE.sub("", path)):
        raise ConfigError(f"key '{key}': {path!r}: only ~, $NAME and ${{NAME}} are expanded; write it out")
    expanded = _VARIABLE.sub(lambda found: _variable(key, path, found[1].strip("{}")), path)
    try:
        return str(Path(expanded).expanduser().absolute())
    except RuntimeError:
        raise ConfigError(f"key '{key}': {path!r} names the home of an unknown user; write it out") from None


def tar_patterns(place: str) -> list[str]:
    """Return the patterns of tars in a source; `::` joins several, as webdataset has it.

    A folder may have `::` in its name.
    """
    return place.split("::") if is_remote(place) else _AFTER_A_TAR.split(place)


def is_remote(place: str) -> bool:
    """Return whether a place is a URL, or `pipe:` and a program, and not a path."""
    return _REMOTE.match(place) is not None


def database_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for another store."""
    if not uri.startswith(SQLITE):
        return None
    return Path(unquote(uri.removeprefix(SQLITE).split("?")[0]))


def sqlite_uri(file: Path) -> str:
    """Return the address of a SQLite file; SQLAlchemy decodes per cent signs and ends a path at `?`."""
    return SQLITE + str(file).replace("%", "%25").replace("?", "%3F")


def with_database(uri: str, file: Path) -> str:
    """Return the address of a SQLite store with another file and the same options behind `?`."""
    _, mark, options = uri.partition("?")
    return sqlite_uri(file) + mark + options


def _variable(key: str, path: str, name: str) -> str:
    if _SECRET.search(name):  # a configuration from others must not bring a secret into a file name
        raise ConfigError(f"key '{key}': {path!r}: ${name} looks like a secret, so it is not expanded")
    if name not in os.environ:
        raise ConfigError(
            f"key '{key}': {path!r}: the variable ${name} is not set; set it, or write the path out"
        )
    return os.environ[name]

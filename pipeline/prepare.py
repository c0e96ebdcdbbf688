"""A run directory from the launcher's side: may this configuration continue it, and what changed since last time."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config import load as configuration
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir import layout
from pipeline.rundir.files import write_text
from pipeline.rundir.redact import redact
from pipeline.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]  # of the code
WEIGHTS_VARIABLE = "CVAE_INCEPTION_WEIGHTS"  # where eval.inception_weights comes from when it is empty


def absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with every path absolute, so that a job may start anywhere."""

    def full(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path else ""

    return replace(
        config,
        runs_dir=full(config.runs_dir),
        shard=replace(config.shard, source=full(config.shard.source)),
        train=replace(config.train, init_from=full(config.train.init_from)),
        eval=replace(
            config.eval,
            inception_weights=full(config.eval.inception_weights or os.environ.get(WEIGHTS_VARIABLE, "")),
            network=full(config.eval.network),
        ),
    )


def recorded(run_dir: Path) -> RunConfig | None:
    """The configuration that the run was last launched with."""
    file = run_dir / "config.yaml"
    return configuration.load([file]) if file.exists() else None


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{'train.images': (old, new), ...} of every key that differs; None stands for a key that is not there."""
    before, after = configuration.flatten(old), configuration.flatten(new)
    keys = [*after, *(key for key in before if key not in after)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def require_continuable(run_dir: Path, config: RunConfig) -> None:
    """Raise ConfigError that names the keys where `config` cannot continue the checkpoints in `run_dir`."""
    old = recorded(run_dir)
    if old is None or not _newest_step(run_dir, config):
        return
    fixed = configuration.leaves(layout.trained_sections(config))
    differing = {key: values for key, values in changes(old, config).items() if key in fixed}
    if differing:
        listed = "; ".join(f"{key}: {then!r} -> {now!r}" for key, (then, now) in differing.items())
        raise ConfigError(
            f"{run_dir}: its checkpoints were trained with other settings ({listed}); "
            f"use another name=... or --run-dir, or train.init_from={run_dir} to start a new run from its weights"
        )


def prepare(run_dir: Path, config: RunConfig, stages: list[str]) -> None:
    """Write config.yaml and append to config_history.jsonl what this launch changes."""
    old = recorded(run_dir)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "step": _newest_step(run_dir, config),
        "stages": stages,
        "changed": changes(old, config) if old else {},
    }
    write_text(run_dir / "config.yaml", configuration.dump(config))
    with open(run_dir / "config_history.jsonl", "a", encoding="utf-8") as history:
        history.write(redact(json.dumps(line)) + "\n")


def _newest_step(run_dir: Path, config: RunConfig) -> int:
    return STAGES["train"].progress(config, run_dir)


def commit() -> str | None:
    """Commit of the code, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None

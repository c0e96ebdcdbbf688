"""Prepare a run directory: check that a configuration may continue it, and record what changed."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pipeline.config import load as configuration
from pipeline.config.paths import absolute_paths
from pipeline.config.schema import PHASES, RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir import layout
from pipeline.rundir.files import write_text
from pipeline.rundir.lines import append_line
from pipeline.rundir.record import read_json, run_config
from pipeline.rundir.redact import redact
from pipeline.stages import STAGES
from pipeline.tracking.address import with_store

ROOT = Path(__file__).resolve().parents[1]  # of the code

# What an evaluation may change for itself alone: how it measures, and how its job runs.
EVALUATION_KEYS = (
    "eval.",
    "cluster.",
    "data.verify",
    "data.damaged",
    "train.threads",
    "train.timeout_s",
    "train.deterministic",
)
DATA_KEYS = ("shard.", "toy.")


def resolved(config: RunConfig) -> RunConfig:
    """Return the configuration that every job and tool reads: absolute paths, and the tracker's store."""
    return with_store(absolute_paths(config))


def recorded(run_dir: Path) -> RunConfig | None:
    """Return the configuration that the run was last launched with, or None for a new run."""
    return run_config(run_dir) if (run_dir / "config.yaml").exists() else None


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return {'train.images': (old, new), ...} of every key that differs; None stands for a missing key."""
    before = configuration.flatten(old)
    after = configuration.flatten(new)
    missing = [key for key in before if key not in after]
    differing = {}
    for key in [*after, *missing]:
        pair = (before.get(key), after.get(key))
        if pair[0] != pair[1]:
            differing[key] = pair
    return differing


def require_continuable(run_dir: Path, config: RunConfig) -> None:
    """Raise ConfigError that names the keys that keep `config` from continuing `run_dir`.

    Each phase that has checkpoints holds its keys, and all of them hold the data. Its length may change.
    """
    old = recorded(run_dir)
    if old is None:
        return
    changed = changes(old, config)
    _require_same_data(run_dir, old, config, changed)
    fixed = configuration.leaves(layout.trained_sections(config))
    for phase in PHASES:
        if not STAGES[phase].progress(config, run_dir):
            continue
        own = fixed if phase == "train" else [key for key in changed if key.startswith(f"{phase}.")]
        differing = {key: changed[key] for key in changed if key in own and key != f"{phase}.images"}
        if differing:
            again = f"start anew from its weights: train.init_from={run_dir}"
            if phase != "train":
                again = f"remove {layout.train_dir(run_dir, phase)} to repeat this stage"
            raise ConfigError(
                f"{run_dir}: its checkpoints of the stage {phase} were trained with other settings "
                f"({listed(differing)}); use another name=... or --run-dir, or {again}"
            )


def _require_same_data(
    run_dir: Path, old: RunConfig, config: RunConfig, changed: dict[str, tuple[Any, Any]]
) -> None:
    """Raise ConfigError with the keys of the data if a run that has checkpoints would get other images."""
    if not any(STAGES[phase].progress(config, run_dir) for phase in PHASES):
        return
    with suppress(ConfigError):  # the shards of one of them may be gone
        if layout.shards_digest(old) == layout.shards_digest(config):
            return
    trained_on = _trained_content(run_dir) or _content(old)
    if trained_on and trained_on == _content(config):
        return  # the same images in another place
    differing = {key: changed[key] for key in changed if key == "data.shards" or key.startswith(DATA_KEYS)}
    raise ConfigError(
        f"{run_dir}: its checkpoints were trained on other data ({listed(differing)}); give the keys of the "
        "data as they were, or use another name=... or --run-dir"
    )


def _content(config: RunConfig) -> str:
    """Return the digest of the shards of a configuration; "" if they are not there."""
    with suppress(ConfigError):
        manifest = read_json(layout.shards_dir(config) / layout.MANIFEST, {})
        return str(manifest.get("content_digest", ""))
    return ""


def _trained_content(run_dir: Path) -> str:
    """Return the digest of the shards that the newest checkpoint was trained on; "" if it is not known."""
    for phase in reversed(PHASES):
        files = sorted(layout.checkpoints_dir(run_dir, phase).glob("step_*.json"))
        if files:
            return str(read_json(files[-1], {}).get("sections", {}).get("shards_content", ""))
    return ""


def evaluates_only(run_dir: Path, config: RunConfig, stages: list[str]) -> bool:
    """Return whether a launch of `stages` only evaluates a finished run once more.

    Such a launch leaves config.yaml as it is. Raises ConfigError if evaluation alone was asked for, but
    other settings of the run differ.
    """
    old = recorded(run_dir)
    wanted = [name for name in stages if STAGES[name].wanted(config)]
    pending = [name for name in wanted if not STAGES[name].complete(config, run_dir)]
    if old is None or pending != ["eval"]:
        return False
    others = {}
    for key, pair in changes(old, config).items():
        if key != "runs_dir" and not key.startswith(EVALUATION_KEYS):  # a moved run is the same run
            others[key] = pair
    if others and stages == ["eval"]:
        raise ConfigError(
            f"{run_dir}: an evaluation leaves the settings of its run as they are, but this launch has "
            f"others ({listed(others)}); leave them out, or evaluate the run as it is: "
            f"`launch.py --run-dir {run_dir} --stages eval`"
        )
    return not others


def listed(differing: dict[str, tuple[Any, Any]]) -> str:
    """Return differing settings as text, "key: old -> new; ..."."""
    return "; ".join(f"{key}: {then!r} -> {now!r}" for key, (then, now) in differing.items())


def schedule_note(run_dir: Path, config: RunConfig) -> str:
    """Say what a new length does to the learning rate of a run that goes on; "" if the length is the same."""
    old = recorded(run_dir)
    if old is None or old.train.images == config.train.images or not _newest_step(run_dir, config):
        return ""
    before, now = old.train.images, config.train.images
    return (
        f"{config.name}: train.images: {before:,} -> {now:,}: from here on the learning rate follows the "
        f"{config.optim.schedule} schedule over {now:,} images, no longer over {before:,}"
    )


def prepare(run_dir: Path, config: RunConfig, stages: list[str], keep: bool = False) -> None:
    """Write config.yaml, and append to config_history.jsonl what this launch changes.

    `keep`: config.yaml stays as it is (see `evaluates_only`).
    """
    old = recorded(run_dir)
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "step": _newest_step(run_dir, config),
        "stages": stages,
        "changed": changes(old, config) if old else {},
    }
    Path(config.runs_dir).mkdir(parents=True, exist_ok=True)  # a recorded folder that is missing was moved
    if not keep:
        write_text(run_dir / "config.yaml", configuration.dump(config))
    append_line(run_dir / "config_history.jsonl", redact(json.dumps(line)))


def _newest_step(run_dir: Path, config: RunConfig) -> int:
    return STAGES["train"].progress(config, run_dir)


def commit() -> str | None:
    """Return the commit of the code, with `-dirty` if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

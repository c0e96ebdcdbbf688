"""What a run directory says about its run: read by the MLflow feeder, the report and the comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.config.load import load
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, DataError
from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics

OF_THE_RUN = {
    "step",
    "images",
    "checkpoint",
    "checkpoint_digest",
    "device",
    "left_out",
}  # what may differ between comparable numbers


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation: the parsed eval/<number>/metrics.json."""

    number: int
    folder: Path
    protocol: dict[str, Any]
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    ceilings: dict[str, float]
    floors: dict[str, float]
    per_attribute: dict[str, dict[str, Any]]
    rare: list[dict[str, Any]]
    seconds: dict[str, float]
    units: list[dict[str, Any]]

    @property
    def complete(self) -> bool:
        """Whether every metric was measured, not just some that were asked for."""
        return not self.protocol.get("left_out")

    @property
    def comparable(self) -> dict[str, Any]:
        """The part of the protocol that must be equal for two runs' numbers to share a table."""
        return {key: value for key, value in self.protocol.items() if key not in OF_THE_RUN}

    @property
    def plots(self) -> list[Path]:
        """plots/*.svg in the order of their names."""
        return sorted((self.folder / "plots").glob("*.svg"))

    @property
    def pictures(self) -> list[Path]:
        """samples/*.png in the order of their names."""
        return sorted((self.folder / "samples").glob("*.png"))


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON in `path`, or `default` where there is no such file; raises DataError where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); remove the file or write it again") from None


def run_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run; raises ConfigError where `run_dir` is not a run directory."""
    file = run_dir / "config.yaml"
    if not file.exists():
        raise ConfigError(
            f"{run_dir}: no config.yaml in it, so it is not a run directory; `launch.py` makes one"
        )
    return load([file])


def evaluations(run_dir: Path) -> list[Evaluation]:
    """Finished evaluations, oldest first; metrics.json is written last, so a folder without it is left out."""
    found = []
    for folder in layout.eval_dirs(run_dir):
        tree = read_json(folder / "metrics.json")
        if tree is not None:
            parts = {
                part.name: tree.get(part.name, [] if part.name in ("rare", "units") else {})
                for part in fields(Evaluation)[2:]
            }
            found.append(Evaluation(int(folder.name), folder, **parts))
    return found


def headline(found: list[Evaluation]) -> Evaluation | None:
    """The evaluation that stands for its run: the newest complete one; where all left metrics out, the newest of these."""
    return next((e for e in reversed(found) if e.complete), found[-1] if found else None)


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of config_history.jsonl: what changed at which step, and with which code."""
    file = run_dir / "config_history.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.exists() else []
    )


def commit(run_dir: Path) -> str:
    """The git commit that the run was last started with, or ""."""
    found = [line.get("commit") for line in history(run_dir)]
    return str(next((c for c in reversed(found) if c), ""))


def jobs(run_dir: Path) -> list[dict[str, Any]]:
    """Submitted jobs and attempts, oldest first: stage, id, state, hosts, times."""
    tree = read_json(run_dir / "jobs.json", [])
    return list(tree["jobs"] if isinstance(tree, dict) else tree)


def trained(run_dir: Path, config: RunConfig) -> dict[str, Any] | None:
    """train/done.json, where training reached the configured length."""
    done = read_json(layout.train_dir(run_dir) / "done.json")
    return done if done and done.get("images", 0) >= config.train.images else None


ENDED_BADLY = {
    "CANCELLED": "KILLED",
    "FAILED": "FAILED",
    "OUT_OF_MEMORY": "FAILED",
    "BOOT_FAIL": "FAILED",
}  # no requeue follows
OPEN_STATES = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "SUSPENDED", "SUBMITTED")


def status(run_dir: Path, config: RunConfig) -> str:
    """RUNNING, FINISHED, FAILED or KILLED: the state of training, and of the evaluation while its job is still to come."""
    last = {job.get("stage", ""): str(job.get("state", "")).split(" ")[0] for job in jobs(run_dir)}
    if trained(run_dir, config) is None:
        if _later(run_dir / "logs/train/error.json", layout.train_dir(run_dir) / "metrics.jsonl"):
            return "FAILED"
        return ENDED_BADLY.get(last.get("train", ""), "RUNNING")
    evaluated = any(
        _later(e.folder / "metrics.json", layout.train_dir(run_dir) / "done.json")
        for e in evaluations(run_dir)
    )
    return "RUNNING" if not evaluated and last.get("eval") in OPEN_STATES else "FINISHED"


def _later(file: Path, other: Path) -> bool:
    """`file` is there and was written after `other`: an error that a later attempt outlived no longer counts."""
    return file.exists() and (not other.exists() or file.stat().st_mtime_ns >= other.stat().st_mtime_ns)


def started(run_dir: Path) -> float:
    """Unix seconds of the first metrics record, else of the configuration."""
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    return float(records[0]["time"]) if records else (run_dir / "config.yaml").stat().st_mtime


def ended(run_dir: Path) -> float:
    """Unix seconds of the last thing that the run wrote for others to read."""
    files = [
        layout.train_dir(run_dir) / "done.json",
        run_dir / "logs/train/error.json",
        run_dir / "config.yaml",
    ]
    files += [e.folder / "metrics.json" for e in evaluations(run_dir)]
    return max(file.stat().st_mtime for file in files if file.exists())

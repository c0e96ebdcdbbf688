"""Read a run directory: its configuration, evaluations, jobs and state."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.config.load import flatten, load, with_values
from pipeline.config.paths import database_file, with_database
from pipeline.config.schema import LATER_PHASES, PATH_KEYS, PHASES, RunConfig
from pipeline.errors import ConfigError, DataError
from pipeline.rundir import layout
from pipeline.rundir.lines import read_json_lines
from pipeline.rundir.metrics_log import read_metrics

# Parts of the protocol that may differ between comparable numbers.
# How a variant is sampled (stage, guidance, edit_strength) belongs to the variant.
OF_THE_RUN = {
    "step",
    "images",
    "checkpoint",
    "checkpoint_digest",
    "device",
    "left_out",
    "stage",
    "guidance",
    "margin",
    "tries",
    "edit_strength",
}

# States of a train job that no requeue follows, and what the run's state then is.
ENDED_BADLY = {"CANCELLED": "KILLED", "FAILED": "FAILED", "OUT_OF_MEMORY": "FAILED", "BOOT_FAIL": "FAILED"}
OPEN_STATES = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "SUSPENDED", "SUBMITTED")


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
    attribute_flips: list[dict[str, Any]]
    seconds: dict[str, float]
    units: list[dict[str, Any]]
    about: dict[
        str, dict[str, Any]
    ]  # direction, meaning, unit, n and more of each metric; empty for an old evaluation

    @property
    def complete(self) -> bool:
        """Return whether every metric was measured, not only some that were asked for."""
        return not self.protocol.get("left_out")

    @property
    def headline_names(self) -> list[str]:
        """The metrics that stand in tables of headline numbers."""
        return [name for name in self.metrics if self.about.get(name, {}).get("headline", True)]

    @property
    def comparable(self) -> dict[str, Any]:
        """Return the part of the protocol that two runs must share for their numbers to share a table."""
        return {key: value for key, value in self.protocol.items() if key not in OF_THE_RUN}

    @property
    def read(self) -> frozenset[str]:
        """Return the attributes that the model reads."""
        rows = self.per_attribute
        return frozenset(name for name, row in rows.items() if row.get("read_by_model", True))

    @property
    def plots(self) -> list[Path]:
        """Return plots/*.svg in the order of their names."""
        return sorted((self.folder / "plots").glob("*.svg"))

    @property
    def pictures(self) -> list[Path]:
        """Return samples/*.png in the order of their names."""
        return sorted((self.folder / "samples").glob("*.png"))


def read_json(path: Path, default: Any = None) -> Any:
    """Return the JSON in `path`, or `default` if there is no such file. Raises DataError if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); remove the file or write it again") from None


def run_config(run_dir: Path, file: Path | None = None) -> RunConfig:
    """Return the resolved configuration of a run, or that of one of its jobs in `file`.

    Raises ConfigError if `run_dir` is not a run directory.
    """
    file = file or run_dir / "config.yaml"
    require_run(run_dir, file)
    return _where_it_lies_now(load([file]), run_dir)


def require_run(run_dir: Path, file: Path | None = None) -> None:
    """Raise ConfigError if `run_dir` is not a run directory. Its configuration may be of another version."""
    if not (file or run_dir / "config.yaml").exists():
        raise ConfigError(
            f"{run_dir}: no config.yaml in it, so it is not a run directory; `launch.py` makes one"
        )


def _where_it_lies_now(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the configuration with new paths if the run, or the whole runs folder, has moved.

    It has moved if the recorded folder is gone. An empty folder in its place is no runs folder either,
    if what runs share lies beside this run.
    """
    before = Path(config.runs_dir).expanduser().absolute()
    now = run_dir.absolute().parent
    if before == now or (before / run_dir.name).exists() or layout.shared_dir_of(before).is_dir():
        return config
    if before.is_dir() and not layout.shared_dir_of(now).is_dir():
        return config
    values = flatten(config)
    moved = {}
    for key in PATH_KEYS:
        path = str(values[key])
        if path == str(before) or path.startswith(f"{before}/"):
            moved[key] = str(now) + path.removeprefix(str(before))
    uri = config.tracking.uri
    database = database_file(uri)
    if database and database.is_relative_to(before):
        moved["tracking.uri"] = with_database(uri, now / database.relative_to(before))
    return with_values(config, moved)


def evaluations(run_dir: Path) -> list[Evaluation]:
    """Return the finished evaluations, oldest first.

    metrics.json is written last, so a folder without it is not finished.
    """
    found = []
    for folder in layout.eval_dirs(run_dir):
        tree = read_json(folder / "metrics.json")
        if tree is not None:
            found.append(_evaluation(folder, tree))
    return found


def _evaluation(folder: Path, tree: dict[str, Any]) -> Evaluation:
    parts = {}
    for part in fields(Evaluation):
        if part.name not in ("number", "folder"):
            empty: Any = [] if part.name in ("rare", "units", "attribute_flips") else {}
            parts[part.name] = tree.get(part.name, empty)
    return Evaluation(int(folder.name), folder, **parts)


def headline(found: list[Evaluation]) -> Evaluation | None:
    """Return the evaluation that stands for its run: the newest complete one, else the newest."""
    for evaluation in reversed(found):
        if evaluation.complete:
            return evaluation
    return found[-1] if found else None


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of config_history.jsonl: what changed at which step, and with which code."""
    return read_json_lines(run_dir / "config_history.jsonl")


def commit(run_dir: Path) -> str:
    """Return the git commit that the run was last started with, or ""."""
    for line in reversed(history(run_dir)):
        if line.get("commit"):
            return str(line["commit"])
    return ""


def jobs(run_dir: Path) -> list[dict[str, Any]]:
    """Return the submitted jobs and their attempts, oldest first: stage, id, state, hosts, times."""
    tree = read_json(run_dir / "jobs.json", [])
    return list(tree["jobs"] if isinstance(tree, dict) else tree)


def variant(config: RunConfig) -> str:
    """Return the run's name without the suffix `-s<seed>` that a sweep adds."""
    return config.name.removesuffix(f"-s{config.seed}")


def effort(run_dir: Path, evaluation: Evaluation | None) -> tuple[list[int], float | None]:
    """Return the images of each phase up to the evaluated checkpoint, and the seconds of these phases."""
    protocol = evaluation.protocol if evaluation else {}
    last = protocol.get("stage", "train") if evaluation else PHASES[-1]
    images, seconds = [], None
    for phase in PHASES[: PHASES.index(last) + 1]:
        done = read_json(layout.train_dir(run_dir, phase) / "done.json") or {}
        seen = protocol.get("images") if phase == last else None
        if seen or "images" in done:
            images.append(int(seen or done["images"]))
        if "seconds" in done:
            seconds = (seconds or 0.0) + done["seconds"]
    return images, seconds


def trained(run_dir: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return train/done.json if training has reached the configured length, else None."""
    done = read_json(layout.train_dir(run_dir) / "done.json")
    return done if done and done.get("images", 0) >= config.train.images else None


def status(run_dir: Path, config: RunConfig) -> str:
    """Return the run's state: RUNNING, FINISHED, FAILED or KILLED.

    A stage that failed ends the run, whichever stage it was. A training that is not complete counts as
    RUNNING, and so does a complete one whose evaluation is still to come.
    """
    last = {job.get("stage", ""): str(job.get("state", "")).split(" ")[0] for job in jobs(run_dir)}
    if trained(run_dir, config) is None:
        if _later(run_dir / "logs/train/error.json", layout.train_dir(run_dir) / "metrics.jsonl"):
            return "FAILED"
        if last.get("train") in OPEN_STATES:
            return "RUNNING"
        bad = _first_bad(last, ("train", "shard", "classifier"))
        return bad or ("FINISHED" if _only_prepared(run_dir, last) else "RUNNING")
    done = layout.train_dir(run_dir) / "done.json"
    evaluated = any(_later(e.folder / "metrics.json", done) for e in evaluations(run_dir))
    if evaluated:
        return "FINISHED"
    if last.get("eval") in OPEN_STATES:
        return "RUNNING"
    return _first_bad(last, (*LATER_PHASES, "classifier", "eval")) or "FINISHED"


def _first_bad(last: dict[str, str], stages: tuple[str, ...]) -> str:
    """Return the state of the run that follows from the first of these stages that ended badly, or ""."""
    found = [ENDED_BADLY[last[stage]] for stage in stages if last.get(stage) in ENDED_BADLY]
    return found[0] if found else ""


def _only_prepared(run_dir: Path, last: dict[str, str]) -> bool:
    """Return whether the newest launch asked for no training, and everything it started is complete."""
    launches = history(run_dir)
    asked = launches[-1].get("stages", ["train"]) if launches else ["train"]
    return "train" not in asked and set(last.values()) == {"COMPLETED"}


def _later(file: Path, other: Path) -> bool:
    """Return whether `file` is there and is newer than `other`; an error that is older counts no more."""
    if not file.exists():
        return False
    return not other.exists() or file.stat().st_mtime_ns >= other.stat().st_mtime_ns


def started(run_dir: Path) -> float:
    """Return the time of the first metrics record, else of the configuration, in unix seconds."""
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    if records:
        return float(records[0]["time"])
    return (run_dir / "config.yaml").stat().st_mtime


def ended(run_dir: Path) -> float:
    """Return the time of the last file that the run wrote for others to read, in unix seconds."""
    files = [
        layout.train_dir(run_dir) / "done.json",
        run_dir / "logs/train/error.json",
        run_dir / "config.yaml",
    ]
    files += [e.folder / "metrics.json" for e in evaluations(run_dir)]
    return max(file.stat().st_mtime for file in files if file.exists())

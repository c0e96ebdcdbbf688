"""How a run was made: launches, jobs, code, inputs and protocol."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.reporting.page import Cell, TableRows, facts, folded, table
from pipeline.reporting.text import duration
from pipeline.rundir import record
from pipeline.rundir.record import Evaluation
from pipeline.rundir.redact import redact


def making(run_dir: Path, evaluation: Evaluation | None) -> str:
    """Return the folded tables of what made this run."""
    items: dict[str, Any] = {
        "commit": record.commit(run_dir) or "unknown",
        "run directory": run_dir.absolute(),
        "logs": run_dir.absolute() / "logs",
    }
    for key, value in (record.read_json(run_dir / "inputs.json") or {}).items():
        items[f"input: {key}"] = value
    if evaluation:
        for key, value in evaluation.protocol.items():
            items.setdefault(key, value)
        for name, seconds in evaluation.seconds.items():
            items[f"measuring {name}"] = duration(seconds)
    return folded(
        "How it was made",
        table(["launched", "at step", "stages", "changed"], _change_rows(run_dir)),
        table(["stage", "job", "state", "hosts", "started", ("took", "n")], _job_rows(run_dir)),
        facts(items),
    )


def _change_rows(run_dir: Path) -> TableRows:
    """One row for each launch, with the settings that it changed."""
    rows: TableRows = []
    for line in record.history(run_dir):
        changes = []
        for key, value in line.get("changed", {}).items():
            shown = f"{value[0]} → {value[1]}" if isinstance(value, list) else str(value)
            changes.append(f"{key}: {shown}")
        step: Cell = (str(line.get("step", "")), "n")
        stages = " ".join(line.get("stages", []))
        rows.append(("", [str(line.get("time", "")), step, stages, redact(", ".join(changes)) or "–"]))
    return rows


def _job_rows(run_dir: Path) -> TableRows:
    """One row for each attempt of each job."""
    rows: TableRows = []
    for job in record.jobs(run_dir):
        for attempt in job.get("attempts") or [{}]:
            began, ended = attempt.get("started"), attempt.get("ended")
            when = datetime.fromtimestamp(began).isoformat(" ", "seconds") if began else "–"
            took = duration(ended - began) if began and ended else "–"
            state = str(attempt.get("state") or job.get("state", ""))
            hosts = ", ".join(attempt.get("hosts", []))
            stage, job_id = str(job.get("stage", "")), str(job.get("id", ""))
            rows.append(("", [stage, job_id, state, hosts, when, (took, "n")]))
    return rows

"""metrics.jsonl survives resumes and crashes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.rundir import files
from pipeline.rundir.metrics_log import MetricsLog, read_metrics


def steps(path: Path) -> list[int]:
    return [r["step"] for r in read_metrics(path)]


def test_resume_cuts_later_and_half_written_records(tmp_path: Path) -> None:
    path = tmp_path / "train/metrics.jsonl"
    log = MetricsLog(path, None)
    for step in range(1, 6):
        log.append(step, {"train/loss": step / 3})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "time": 1.0, "values": {"train/lo')
    assert steps(path) == [1, 2, 3, 4, 5]
    log = MetricsLog(path, 3)
    log.append(4, {"train/loss": -1.0})
    assert [(r["step"], r["values"]["train/loss"]) for r in read_metrics(path)] == [
        (1, 1 / 3),
        (2, 2 / 3),
        (3, 1.0),
        (4, -1.0),
    ]
    log.close()


def test_fresh_start_forgets_records_of_a_training_without_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, None).append(1, {"a": 1.0})
    MetricsLog(path, None).close()
    assert read_metrics(path) == []


def test_a_record_cut_at_a_number_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "time": 1.0, "values": {"a": 123}}'
    path.write_text(
        whole + "\n" + whole.replace('"step": 1', '"step": 2')
    )  # complete JSON, but no newline yet
    assert steps(path) == [1]


def test_non_finite_values_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    log.append(1, {"a": math.nan, "b": -math.inf, "c": 2.0})
    log.sync()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["values"] == {
        "a": "nan",
        "b": "-inf",
        "c": 2.0,
    }
    values = read_metrics(path)[0]["values"]
    assert math.isnan(values["a"]) and values["b"] == -math.inf and values["c"] == 2.0
    log.close()


def test_damage_in_the_middle_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1, "values": {}}\nrubbish\n{"step": 2, "time": 1, "values": {}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_cut_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    log.append(1, {"a": 1.0})
    log.append(2, {"a": 1.0})
    log.close()
    before = path.read_bytes()

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, 1)
    assert path.read_bytes() == before

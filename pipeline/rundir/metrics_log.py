"""metrics.jsonl: the truth about a training run, one record a line, complete without any server."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import DataError
from pipeline.rundir.files import refused, write_text
from pipeline.rundir.lines import whole_lines


class MetricsLog:
    """Appends {"step", "time", "values"} lines to metrics.jsonl; only rank 0 holds one."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Open `path` to continue after `resume_step`; later records and a torn one are cut off first.

        None cuts off all records: a training that died before its first checkpoint makes them again.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = []
            if resume_step is not None:
                kept = [record for record in _raw_records(path) if record["step"] <= resume_step]
            write_text(path, "".join(_line(record) for record in kept))
        self._path = path
        self._file: TextIO = open(path, "a", buffering=1, encoding="utf-8")  # line-buffered

    def append(self, step: int, values: dict[str, float]) -> None:
        """Write one record at once.

        JSON has no NaN, so non-finite values become the strings "nan", "inf" and "-inf".
        """
        written: dict[str, float | str] = {}
        for name, value in values.items():
            number = float(value)
            written[name] = number if math.isfinite(number) else str(number)
        try:
            self._file.write(_line({"step": int(step), "time": round(time.time(), 3), "values": written}))
        except OSError as error:
            raise refused(self._path, error) from None

    def sync(self) -> None:
        """Bring every record to the disk (any thread).

        This happens before a checkpoint's JSON is written, because the checkpoint vouches for the records.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise refused(self._path, error) from None

    def close(self) -> None:
        """Bring every record to the disk and close the file."""
        self.sync()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records {"step": int, "time": unix seconds, "values": {name: float}}, in order.

    There are none if there is no file. Values may be nan and inf. A half-written last line is left out.
    Raises DataError that names the line if an earlier one is damaged.
    """
    records = _raw_records(path)
    for record in records:
        record["values"] = {name: float(value) for name, value in record["values"].items()}
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _raw_records(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in whole_lines(path):
        try:
            records.append(_parsed(line))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise DataError(
                f"{path}, line {number}: not a metrics record; remove the line and start again"
            ) from None
    return records


def _parsed(line: bytes) -> dict[str, Any]:
    """Parse and check one record; raises one of many errors if it is damaged."""
    record = json.loads(line)
    if not isinstance(record["step"], int) or not isinstance(record["time"], (int, float)):
        raise TypeError
    for value in record["values"].values():
        float(value)  # "nan" and "inf" too
    return record

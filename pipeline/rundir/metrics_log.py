"""metrics.jsonl: the truth about a training run, one line per record, complete without any server."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import DataError, StorageError
from pipeline.rundir.files import write_text


class MetricsLog:
    """Appends {"step", "time", "values"} lines to metrics.jsonl; rank 0 alone holds one."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Open `path` to continue after `resume_step`: later records, and a half-written one, are cut off first.

        None starts afresh: a training that died before its first checkpoint leaves records that will be made again.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = (
                []
                if resume_step is None
                else [record for record in _raw_records(path) if record["step"] <= resume_step]
            )
            write_text(path, "".join(_line(record) for record in kept))
        self._file: TextIO = open(path, "a", buffering=1, encoding="utf-8")

    def append(self, step: int, values: dict[str, float]) -> None:
        """Write one record at once; JSON has no NaN, so non-finite values become the strings "nan", "inf" and "-inf"."""
        numbers = {name: float(value) for name, value in values.items()}
        written = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        try:
            self._file.write(_line({"step": int(step), "time": round(time.time(), 3), "values": written}))
        except OSError as error:
            raise self._refused(error) from None

    def sync(self) -> None:
        """Bring every record to the disk (any thread); done before a checkpoint's JSON is written, which then vouches for them."""
        try:
            os.fsync(self._file.fileno())  # the file is line-buffered: nothing waits in this process
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._file.name}: could not be written ({error.strerror}); make room, then the same command continues"
        )

    def close(self) -> None:
        """Bring every record to the disk and close the file."""
        self.sync()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records {"step": int, "time": unix seconds, "values": {name: float, also nan and inf}}; none where there is no file.

    A half-written last line is left out. Raises DataError that names the line where an earlier one is damaged.
    """
    if not path.exists():
        return []
    records = _raw_records(path)
    for record in records:
        record["values"] = {name: float(value) for name, value in record["values"].items()}
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _raw_records(path: Path) -> list[dict[str, Any]]:
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            known = {"step": int, "time": (int, float), "values": dict}
            if not all(isinstance(record[key], kind) for key, kind in known.items()):  # type: ignore[arg-type]
                raise TypeError
            for value in record["values"].values():
                float(value)  # "nan" and "inf" too
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            if number == len(lines):  # no newline behind it: the writer died, or is at it just now
                break
            raise DataError(
                f"{path}, line {number}: not a metrics record; remove the line and start again"
            ) from None
        if number < len(
            lines
        ):  # the last piece counts only with its newline: a cut-off number would still parse
            records.append(record)
    return records

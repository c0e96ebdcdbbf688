"""Append-only files: one record a line, in a file that a killed process or a full disk may have torn.

All readers agree: a last line without its newline does not count, and other damage is named.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from pipeline.rundir.files import refused
from pipeline.rundir.lock import locked

log = logging.getLogger("cvae.lines")


def append_line(file: Path, line: str) -> None:
    """Append one line to `file` and bring it to the disk. Raises StorageError if the disk refuses.

    If a process died in the middle of the last line, that line is cut off first. The lock keeps a launch
    from cutting the line that another one is writing.
    """
    with locked(file):
        try:
            with open(file, "ab+") as opened:
                opened.seek(0)
                opened.truncate(opened.read().rfind(b"\n") + 1)
                opened.write(line.encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            raise refused(file, error) from error


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object a line; none if there is no file.

    Another damaged line than a torn last one is left out with a warning that names it.
    """
    values = []
    for number, line in whole_lines(file):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError
            values.append(value)
        except (ValueError, RecursionError):
            log.warning("%s, line %d: is damaged, so it is left out; remove it", file, number)
    return values


def whole_lines(file: Path) -> list[tuple[int, bytes]]:
    """Return (number, content) of the lines of an append-only file that are not empty; none without a file.

    The last piece has no newline behind it: its writer died, or is writing it now. It does not count, even
    if it parses, because a number may be cut off.
    """
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

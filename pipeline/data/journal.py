"""The journal of the shard stage: the shards that are finished.

An interrupted run goes on from here, and one damaged shard can be made again alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.rundir.files import write_text
from pipeline.rundir.lines import append_line, read_json_lines


@dataclass(frozen=True)
class ShardReport:
    """One finished shard: its entry in the manifest, and what the manifest sums up."""

    file: str
    samples: int
    bytes: int
    sha256: str
    label_counts: list[int]  # samples that have each attribute
    skipped: list[list[str]]  # [name, reason] of damaged images
    index: str = ""  # sha256 of the index beside an encoded tar


class Journal:
    """`journal*.jsonl` beside the shards, one for each job that writes.

    The first line is the source's fingerprint, every other line a report.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def resume(self, fingerprint: dict[str, str], planned: set[str]) -> dict[str, ShardReport]:
        """Start this run's journal with the reports that earlier runs left.

        Reports are taken from every journal of the same source, for the `planned` shards.
        """
        done: dict[str, ShardReport] = {}
        for file in sorted(self.file.parent.glob("journal*.jsonl")):
            for name, report in _read(file, fingerprint).items():
                if name in planned:
                    done[name] = report
        lines = [fingerprint, *(dataclasses.asdict(report) for report in done.values())]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        return done

    def add(self, report: ShardReport) -> None:
        """Append the report of a finished shard."""
        append_line(self.file, json.dumps(dataclasses.asdict(report)))


def _read(file: Path, fingerprint: dict[str, str]) -> dict[str, ShardReport]:
    """Return the reports in one journal of this source. A shard whose line is damaged is written again."""
    done: dict[str, ShardReport] = {}
    try:
        first, *rest = read_json_lines(file)
        if first == fingerprint:
            for line in rest:
                report = ShardReport(**line)
                done[report.file] = report
    except (OSError, ValueError, TypeError):
        pass  # without a journal every shard is written again
    return done


def clear_folder(folder: Path, keep: set[str]) -> None:
    """Delete unfinished files and every tar except `keep`. No other job may be writing there."""
    for stale in [*folder.glob("*.tar"), *folder.glob(".*.tmp")]:
        if stale.name not in keep:
            stale.unlink()

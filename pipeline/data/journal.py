"""What the shard stage has finished so far: an interrupted run goes on from here, and one damaged shard can be made again alone."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.rundir.files import write_text


@dataclass(frozen=True)
class ShardReport:
    """One finished shard: its manifest entry, and what the manifest sums up."""

    file: str
    samples: int
    bytes: int
    sha256: str
    label_counts: list[int]  # samples that have each attribute
    skipped: list[list[str]]  # [name, reason] of damaged images


class Journal:
    """`journal*.jsonl` beside the shards, one for each job that writes: first the sources' digests, then a report per line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def resume(self, sources: dict[str, str], planned: set[str]) -> dict[str, ShardReport]:
        """Reports of the `planned` shards that earlier runs on the same sources finished, from every journal; starts this run's own."""
        done: dict[str, ShardReport] = {}
        for file in sorted(self.file.parent.glob("journal*.jsonl")):
            done |= {name: report for name, report in _read(file, sources).items() if name in planned}
        lines = [sources, *(dataclasses.asdict(report) for report in done.values())]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        return done

    def add(self, report: ShardReport) -> None:
        """Append the report of a finished shard."""
        with self.file.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(report)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(file: Path, sources: dict[str, str]) -> dict[str, ShardReport]:
    done: dict[str, ShardReport] = {}
    try:
        first, *rest = file.read_text().splitlines()
        if json.loads(first) == sources:
            for line in rest:
                report = ShardReport(**json.loads(line))
                done[report.file] = report
    except (OSError, ValueError, TypeError):
        pass  # a last line that was cut off: the shards it lacks are written again
    return done


def clear_folder(folder: Path, keep: set[str]) -> None:
    """Remove unfinished files and every tar but those in `keep`; only while no other job writes there."""
    for stale in [*folder.glob("*.tar"), *folder.glob(".*.tmp")]:
        if stale.name not in keep:
            stale.unlink()

"""What the shard stage has finished so far: an interrupted run goes on from here, and one damaged shard can be made again alone."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.files import write_text


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
    """`journal.jsonl` beside the shards: the digests of the sources in its first line, each further line one report."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def resume(self, sources: dict[str, str], planned: set[str]) -> dict[str, ShardReport]:
        """Reports of the `planned` shards that an earlier run on the same sources finished.

        Clears the folder of all other tars and of unfinished files, and starts the journal of this run.
        """
        done = {name: report for name, report in self._read(sources).items() if name in planned}
        folder = self.file.parent
        for stale in [*folder.glob("*.tar"), *folder.glob(".*.tmp")]:
            if stale.name not in done:
                stale.unlink()
        lines = [sources, *(dataclasses.asdict(report) for report in done.values())]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        return done

    def add(self, report: ShardReport) -> None:
        """Append the report of a finished shard."""
        with self.file.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(report)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, sources: dict[str, str]) -> dict[str, ShardReport]:
        done: dict[str, ShardReport] = {}
        try:
            first, *rest = self.file.read_text().splitlines()
            if json.loads(first) == sources:
                for line in rest:
                    report = ShardReport(**json.loads(line))
                    done[report.file] = report
        except (OSError, ValueError, TypeError):
            pass  # no journal yet, or a last line that was cut off: the shards it lacks are written again
        return done

"""Verify shards at the speed of the disk, and make damaged ones again from their source.

Every byte is read. With --repair, damaged tars are written again, byte for byte as they were, with the
sharding and the source that RUN_DIR/config.yaml names. Exits with 1 if damage is left.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import parser
from pipeline.data.annotations import ANNOTATIONS, write_annotations
from pipeline.data.encoded.index import index_file, read_index
from pipeline.data.encoded.remote import Remote, is_url
from pipeline.data.manifest import entries_of, read_manifest, stored_as
from pipeline.data.records import RecordFormat
from pipeline.data.shards import map_verified, open_shard
from pipeline.data.sources.base import Source
from pipeline.data.writer import write_shard
from pipeline.errors import DataError, exit_code
from pipeline.rundir import layout
from pipeline.rundir.files import sha256, sync_folder
from pipeline.rundir.layout import MANIFEST
from pipeline.rundir.record import run_config
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.stages.shard import planned

log = logging.getLogger("cvae.check_shards")

EXAMPLES = """\
  python tools/check_shards.py runs/sigma_cvae_nf
  python tools/check_shards.py runs/sigma_cvae_nf --repair runs/sigma_cvae_nf
"""


def damage(folder: Path, tars: str = "") -> dict[str, str]:
    """Return the files that differ from the manifest, and how; tars that it does not list too.

    `tars`: the folder or URL of encoded tars that do not lie in `folder`. Raises DataError if the manifest
    itself is damaged.
    """
    manifest = read_manifest(folder, strangers="ignore")
    entries = entries_of(manifest)

    def why(entry: dict[str, Any]) -> str:
        try:
            verify(folder, tars, manifest, entry)
        except DataError as error:
            return str(error)
        return ""

    start = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing releases the interpreter lock
        reasons = list(pool.map(why, entries))
    seconds = time.monotonic() - start
    megabytes = sum(entry["bytes"] for entry in entries) / 1e6
    log.info("%d shards, %.0f MB in %.2f s: %.0f MB/s", len(entries), megabytes, seconds, megabytes / seconds)
    found = {entry["file"]: reason for entry, reason in zip(entries, reasons, strict=True) if reason}
    known = {entry["file"] for entry in entries}
    for tar in sorted(folder.glob("*.tar")):
        if tar.name not in known:
            found[tar.name] = f"{tar}: is not listed in {MANIFEST}"
    if _annotations_differ(folder, manifest):
        found[ANNOTATIONS] = f"{folder / ANNOTATIONS}: is missing or differs from {MANIFEST}"
    return found


def verify(folder: Path, tars: str, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    """Read every byte of one tar, and its index if it is encoded. Raises DataError."""
    attributes = len(manifest["attributes"])
    if stored_as(manifest) == "strided":
        form = RecordFormat(manifest["size"], attributes)
        open_shard(folder, entry, form, "always").close()
        return
    read_index(folder, entry, attributes)
    if not is_url(tars):
        map_verified(Path(tars or folder) / entry["file"], entry, "always").close()
        return
    for _ in Remote(tars).stream(entry):
        pass


def _annotations_differ(folder: Path, manifest: dict[str, Any]) -> bool:
    if "annotations" not in manifest:
        return False  # shards of an older version have no such file
    file = folder / ANNOTATIONS
    return not file.is_file() or sha256(file) != manifest["annotations"]["sha256"]


def repair(folder: Path, names: set[str], run_dir: Path) -> None:
    """Make the files `names` again from the source.

    Each takes its place only if it is byte for byte what the manifest lists. Raises DataError.
    """
    config = run_config(run_dir)
    shards = layout.shards_dir(config)
    if shards.resolve() != folder.resolve():
        raise DataError(
            f"{run_dir}: its shards are {shards}, not {folder}; give a run that was trained on these"
        )
    context = Context(run_dir, Ranks(), StopFlag(), log)
    source, tasks = planned(config, context)
    manifest = read_manifest(folder, strangers="ignore")
    wanted = {entry["file"]: entry["sha256"] for entry in entries_of(manifest)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".repair-") as made:
        aside = Path(made)
        for task in tasks:
            if task.file.name in names:
                fresh = aside / task.file.name
                report = write_shard(replace(task, file=fresh, done=None))
                _take_place(fresh, task.file, wanted.get(task.file.name, ""), source)
                if report.index:
                    _take_place(index_file(fresh), index_file(task.file), report.index, source)
        if ANNOTATIONS in names:
            write_annotations(aside, source.annotated)
            _take_place(aside / ANNOTATIONS, folder / ANNOTATIONS, manifest["annotations"]["sha256"], source)


def _take_place(fresh: Path, file: Path, wanted: str, source: Source) -> None:
    if sha256(fresh) != wanted:
        raise DataError(
            f"{source.location}: is not the source that these shards were made from: "
            f"{file.name}, made again, differs from {MANIFEST}; it was left as it is"
        )
    os.replace(fresh, file)
    sync_folder(file.parent)
    log.info("%s: made again", file)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises DataError; exits with 1 if damage is left."""
    words = parser("tools/check_shards.py", __doc__, EXAMPLES)
    words.add_argument(
        "folder", metavar="FOLDER", type=Path, help="run directory, or folder of tars with manifest.json"
    )
    words.add_argument(
        "--repair", metavar="RUN_DIR", type=Path, help="make damaged tars again with this run's configuration"
    )
    args = words.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder, tars = args.folder, ""
    if (folder / "config.yaml").exists():
        config = run_config(folder)
        folder, tars = layout.shards_dir(config), config.data.tars
    found = damage(folder, tars)
    for reason in found.values():
        print(reason)
    if found and args.repair:
        repair(folder, set(found), args.repair.absolute())
        found = damage(folder, tars)
    print(f"{folder}: {len(found)} damaged" if found else f"{folder}: intact")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(exit_code(main))

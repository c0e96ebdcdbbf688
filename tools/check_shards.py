"""Verify shards at the speed of the disk, and make damaged ones again from their source.

`python tools/check_shards.py FOLDER` reads every byte; `--repair RUN_DIR` writes what is damaged anew, byte for byte as it was,
with the sharding and the source that RUN_DIR/config.yaml names. Exits with 1 where damage is left.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data.records import RecordFormat
from pipeline.data.shards import MANIFEST, open_shard, read_manifest
from pipeline.data.writer import write_shard
from pipeline.errors import DataError, exit_code
from pipeline.rundir import layout
from pipeline.rundir.files import sha256, sync_folder
from pipeline.rundir.record import run_config
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.stages.shard import planned

log = logging.getLogger("check_shards")


def damage(folder: Path) -> dict[str, str]:
    """Names of the tars that differ from the manifest, and how; extra ones included. Raises DataError where the manifest itself does."""
    manifest = read_manifest(folder, strangers="ignore")
    form = RecordFormat(manifest["size"], len(manifest["attributes"]))
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]

    def why(entry: dict) -> str:
        try:
            open_shard(folder, entry, form, "always").close()
        except DataError as error:
            return str(error)
        return ""

    start = time.monotonic()
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0))
    ) as pool:  # hashing and reading leave the interpreter alone
        found = {
            entry["file"]: reason
            for entry, reason in zip(entries, pool.map(why, entries), strict=True)
            if reason
        }
    seconds, megabytes = time.monotonic() - start, sum(entry["bytes"] for entry in entries) / 1e6
    log.info("%d shards, %.0f MB in %.2f s: %.0f MB/s", len(entries), megabytes, seconds, megabytes / seconds)
    known = {entry["file"] for entry in entries}
    return found | {
        tar.name: f"{tar}: is not listed in {MANIFEST}"
        for tar in folder.glob("*.tar")
        if tar.name not in known
    }


def repair(folder: Path, names: set[str], run_dir: Path) -> None:
    """Write the tars `names` again from the source; each takes its place only if it is byte for byte what the manifest lists."""
    config = run_config(run_dir)
    if layout.shards_dir(config).resolve() != folder.resolve():
        raise DataError(
            f"{run_dir}: its shards are {layout.shards_dir(config)}, not {folder}; give a run that was trained on these"
        )
    celeba, tasks = planned(config, Context(run_dir, Ranks(), StopFlag(), log), len(os.sched_getaffinity(0)))
    manifest = read_manifest(folder, strangers="ignore")
    if manifest["source"] != celeba.digests:
        raise DataError(
            f"{celeba.images}: is not the source that these shards were made from (its digests differ); nothing was changed"
        )
    wanted = {
        entry["file"]: entry["sha256"] for split in manifest["splits"].values() for entry in split["shards"]
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".repair-") as aside:
        for task in tasks:
            if task.file.name not in names:
                continue
            fresh = Path(aside) / task.file.name
            write_shard(replace(task, file=fresh, done=None))
            if sha256(fresh) != wanted[task.file.name]:
                raise DataError(
                    f"{task.file}: made again from {celeba.images}, it differs from {MANIFEST}: the images have changed"
                )
            os.replace(fresh, task.file)
            sync_folder(folder)
            log.info("%s: made again", task.file)


def main(argv: list[str] | None = None) -> None:
    """Command line. Raises DataError; exits with 1 where damage is left."""
    parser = argparse.ArgumentParser(
        prog="tools/check_shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, help="folder of tars that holds manifest.json, or a run directory"
    )
    parser.add_argument(
        "--repair", metavar="RUN_DIR", type=Path, help="make damaged tars again with this run's configuration"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = (
        layout.shards_dir(run_config(args.folder)) if (args.folder / "config.yaml").exists() else args.folder
    )
    found = damage(folder)
    for reason in found.values():
        print(reason)
    if found and args.repair:
        repair(folder, set(found), args.repair.absolute())
        found = damage(folder)
    print(f"{folder}: {f'{len(found)} damaged' if found else 'intact'}")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(exit_code(main))

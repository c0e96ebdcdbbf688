"""One epoch of tars behind a slow store, through a cache that holds a tenth of them."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import DataConfig
from pipeline.data.encoded.index import index_file, write_index
from pipeline.data.encoded.packer import EncodedTar
from pipeline.data.encoded.reader import EncodedShards
from pipeline.data.loader import Prefetcher, TrainBatches
from pipeline.data.manifest import content_digest
from pipeline.data.records import TAIL
from pipeline.data.sources.base import SPLITS
from pipeline.data.staging import node_cache
from pipeline.rundir.files import sha256, write_json
from pipeline.rundir.layout import MANIFEST, SHARD_FORMAT
from tools.dev.benchmarks.harness import Bench, Result, measure
from tools.dev.benchmarks.store import Store, serving

TARS = 160
FEW_TARS = 40  # of a shorter measurement, for tests
FULL_S = 1.0
IMAGES = 32  # in a tar
IMAGE_BYTES = 80_000
BYTES_PER_S = 50e6
SHARE = 0.1  # of the data set that the cache holds
BATCH = 64
ONE_PROCESS = "one rank"


class Undecoded(EncodedShards):
    """Reads every image file but decodes none: 50 MB/s of JPEGs are more than two cores decode."""

    def _pixels(self, shard: int, row: int, box: np.ndarray | None) -> np.ndarray:
        assert len(self.content(shard, row)) == IMAGE_BYTES
        return np.zeros((self.size, self.size, 3), np.uint8)


def streaming(bench: Bench) -> dict[str, Result]:
    """Measure how near an epoch comes to the rate of the store, and whether memory grows."""
    folder = bench.folder / "streamed"
    tars = TARS if bench.seconds >= FULL_S else FEW_TARS
    total = write_tars(folder, tars)
    steps = tars * IMAGES // BATCH
    memory: list[float] = []
    sent: list[float] = []

    def epoch() -> float:
        with serving(folder, BYTES_PER_S) as store, opened(folder, store, total, tars) as batches:
            start = time.perf_counter()
            with closing(Prefetcher(batches.at, 0, steps)) as made:
                for step, _ in enumerate(made):
                    if step == steps // 4:
                        memory.append(-resident_mb())
            seconds = time.perf_counter() - start
            memory[-1] += resident_mb()
            sent.append(sum(store.sent.values()) / total)
        return total / seconds / BYTES_PER_S

    measured = measure({ONE_PROCESS: epoch}, bench.repeats)
    protocol = (
        f"{tars} tars of {total / tars / 1e6:.2f} MB behind a server on this machine that sends "
        f"{BYTES_PER_S / 1e6:.0f} MB/s; the cache holds {SHARE:.0%} of them. One epoch in batches of "
        f"{BATCH} in the prefetch thread, without decoding. The store sent at most {max(sent):.2f} times "
        f"the data set, tars of the next epoch included. Resident memory after the epoch, less that after "
        f"a quarter of it: at most {max(memory):.1f} MB; the largest ever was {peak_mb():.0f} MB."
    )
    head = {"title": "Streaming", "unit": "share of the store's rate", "protocol": protocol}
    return {"streaming": head | measured}


def write_tars(folder: Path, tars: int) -> int:
    """Write so many tars of random bytes and their manifest; return the bytes of all tars."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    entries: list[dict[str, Any]] = []
    for number in range(tars):
        file = folder / f"train-{number:05d}.tar"
        tar = EncodedTar()
        with file.open("wb") as opened_file:
            for image in range(IMAGES):
                content = b"\xff\xd8" + rng.bytes(IMAGE_BYTES - 2)
                opened_file.write(tar.pack(f"{number:04d}{image:04d}", np.zeros(1, np.uint8), content))
            opened_file.write(TAIL)
        index = write_index(index_file(file), tar.index())
        size = file.stat().st_size
        entry = {"file": file.name, "samples": IMAGES, "bytes": size, "sha256": sha256(file), "index": index}
        entries.append(entry)
    splits: dict[str, dict[str, Any]] = {split: {"shards": []} for split in SPLITS}
    splits["train"]["shards"] = entries
    digest = content_digest(entries)
    manifest: dict[str, Any] = {
        "format": SHARD_FORMAT,
        "content_digest": digest,
        "stored_as": "encoded",
        "size": 8,
        "crop": 8,
    }
    manifest |= {"attributes": ["any"], "splits": splits}
    write_json(folder / MANIFEST, manifest)
    return sum(entry["bytes"] for entry in entries)


@contextmanager
def opened(folder: Path, store: Store, total: int, tars: int) -> Iterator[TrainBatches]:
    """Open the tars behind the store with an empty cache."""
    place = folder.parent / f"cache-{time.monotonic_ns()}"
    at_once = max(1, int(tars * SHARE) // 2)
    data = replace(
        DataConfig(),
        tars=store.url,
        cache_dir=str(place),
        cache_gb=total * SHARE / 1e9,
        shards_at_once=at_once,
    )
    shards = Undecoded(folder, "train", tars=node_cache(data, "streamed"))
    try:
        yield TrainBatches(shards, data, 0, BATCH, 1, rank=0, world_size=1)
    finally:
        shards.close()


def resident_mb() -> float:
    """Return the memory of this process that is in RAM, without the pages of mapped files, MB."""
    fields = Path("/proc/self/statm").read_text().split()
    pages = int(fields[1]) - int(fields[2])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb() -> float:
    """Return the largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

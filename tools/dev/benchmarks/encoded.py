"""Images per second from image files: encoded shards, torchvision's folder, webdataset's pipeline."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.config.schema import RunConfig
from pipeline.data.annotations import write_annotations
from pipeline.data.encoded.reader import EncodedShards
from pipeline.data.loader import TrainBatches
from pipeline.data.manifest import build_manifest
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.decode import decode
from pipeline.data.workers import write_shards
from pipeline.data.writer import plan_shards
from pipeline.rundir.files import write_json
from pipeline.rundir.layout import MANIFEST
from pipeline.runtime.preempt import StopFlag
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure
from tools.dev.benchmarks.loader import ENDLESS, WORKERS, JpegFolder, ours, rate

FOLDER = "torchvision, DataLoader"
WEBDATASET = "webdataset, DataLoader"
ENCODED = "encoded shards, uint8"
FLOATS = "encoded shards, float32 on the CPU"
TARGETS = {(FLOATS, FOLDER): 1.5, (FLOATS, WEBDATASET): 1.5}
SHUFFLED = 1000  # samples in webdataset's shuffle buffer
LARGE = 512  # side of the images for 256 pixels
MOST_LARGE = 600  # of those images
FULL_S = 0.3  # a shorter repetition takes two batches, for tests
MANY_STEPS = 30
LEAST_S = 2.0  # several batches of large images


@dataclass(frozen=True)
class Files:
    """Reads images of any size from a folder."""

    place: Path

    def read(self, name: str) -> np.ndarray:
        """Return the pixels, uint8 [H, W, 3]."""
        return decode(self.read_bytes(name))

    def read_bytes(self, name: str) -> bytes:
        """Return the file."""
        return (self.place / name).read_bytes()

    def where(self, name: str) -> str:
        """Return the path, for messages."""
        return str(self.place / name)


def encoded(bench: Bench) -> dict[str, Result]:
    """Measure at 128 pixels, and at 256 from enlarged images."""
    small = replace(bench.config.shard, size=128, crop=148, format="encoded")
    large = replace(bench.config.shard, size=256, crop=LARGE, format="encoded")
    found = {}
    for section, source in ((small, bench.celeba), (large, enlarged(bench))):
        config = replace(bench.config, shard=section)
        found[f"encoded_{section.size}"] = compare(bench, config, source)
    return found


def enlarged(bench: Bench) -> Celeba:
    """Return a part of the data set with images whose smaller side has LARGE pixels."""
    place = bench.folder / "large"
    place.mkdir()
    train = np.flatnonzero(bench.celeba.splits == 0)[:MOST_LARGE]
    rows = np.union1d(train, [np.flatnonzero(bench.celeba.splits == split)[0] for split in (1, 2)])
    names = [bench.celeba.names[row] for row in rows]
    for name in names:
        image = Image.fromarray(bench.celeba.images.read(name))
        scale = LARGE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image.resize(size, Image.Resampling.BICUBIC).save(place / name, "JPEG", quality=90)
    return replace(
        bench.celeba,
        images=Files(place),  # type: ignore[arg-type]
        names=names,
        keys=[bench.celeba.keys[row] for row in rows],
        labels=bench.celeba.labels[rows],
        splits=bench.celeba.splits[rows],
    )


def compare(bench: Bench, config: RunConfig, source: Celeba) -> Result:
    """Measure the three loaders on the same images."""
    shards = bench.folder / f"encoded-{config.shard.size}"
    shards.mkdir()
    reports = list(write_shards(plan_shards(source, config.shard, shards), 1, StopFlag()))
    annotations = write_annotations(shards, source.annotated)
    write_json(shards / MANIFEST, build_manifest(source, config.shard, reports, annotations))

    jpegs = JpegFolder(source, config)
    size = config.train.batch_size
    folder = DataLoader(jpegs, size, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    tars = tars_of(shards, jpegs, size)
    # Workers hold a few finished batches when the clock starts, so there must be many more.
    steps, seconds = (
        (MANY_STEPS, max(bench.seconds, LEAST_S)) if bench.seconds >= FULL_S else (2, bench.seconds)
    )
    jpegs.length = steps * size
    threads = torch.get_num_threads()
    torch.set_num_threads(WORKERS)  # that decode
    reader = EncodedShards(shards, "train")
    torch.set_num_threads(1)
    batches = TrainBatches(reader, config.data, config.seed, size, config.model.z_dim, rank=0, world_size=1)
    contenders: Contenders = {
        FOLDER: lambda: rate(folder, math.inf, 1),
        WEBDATASET: lambda: rate(limited(tars, steps), math.inf, 1),
        ENCODED: lambda: ours(batches, ENDLESS, seconds, 1, floats=False),
        FLOATS: lambda: ours(batches, ENDLESS, seconds, 1, floats=True),
    }
    try:
        measured = measure(contenders, bench.repeats, TARGETS, warm_up=True)
    finally:
        torch.set_num_threads(threads)
    height, width = source.images.read(source.names[0]).shape[:2]
    protocol = (
        f"{len(jpegs.files)} JPEGs of {width}x{height} pixels to {config.shard.size}, with 40 labels, in "
        f"batches of {size}, counted in the main process. {FOLDER}: as in the benchmark `loader`, "
        f"{WORKERS} workers. {WEBDATASET}: the same tars, a buffer of {SHUFFLED} samples, "
        f"{WORKERS} workers. Encoded shards: {WORKERS} threads decode. Files in the page cache."
    )
    title = f"Loader of image files, {config.shard.size} pixels"
    return {"title": title, "unit": "images/s", "protocol": protocol, **measured}


def tars_of(shards: Path, jpegs: JpegFolder, batch_size: int) -> DataLoader:
    """Return webdataset's own pipeline over the same tars, endless, with the transformations of `jpegs`."""

    def sample(content: dict) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(io.BytesIO(content["jpg"])) as image:
            pixels = jpegs.transform(image.convert("RGB"))
        return pixels, torch.from_numpy(np.load(io.BytesIO(content["attrs.npy"]))).float()

    urls = [str(tar) for tar in sorted(shards.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(urls, resampled=True).shuffle(SHUFFLED).map(sample).batched(batch_size)
    return DataLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)


def limited(batches: DataLoader, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield so many batches of an endless loader."""
    for _, batch in zip(range(steps), batches, strict=False):
        yield batch

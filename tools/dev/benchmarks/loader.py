"""Images per second that reach the main process: this loader against torchvision's."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.config.schema import RunConfig
from pipeline.data.loader import Prefetcher, TrainBatches
from pipeline.data.shards import Shards
from pipeline.data.sources.base import SPLITS, with_usual_crop
from pipeline.data.sources.celeba import Celeba
from pipeline.evaluation import vision
from pipeline.rundir import layout
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure, one_thread

WORKERS = 2  # processes of torch's DataLoader
ENDLESS = 10**9  # steps
SAMPLED_FILES = 500  # files that are checked for pages in the page cache
BASELINE = "torchvision, DataLoader"
UINT8 = "this loader, uint8"
FLOATS = "this loader, float32 on the CPU"
TARGETS = {(UINT8, BASELINE): 50.0, (FLOATS, BASELINE): 25.0}


class JpegFolder(Dataset):
    """A torchvision data set of JPEGs with CelebA's labels.

    PIL decodes; torchvision crops, resizes, flips and normalises.
    """

    def __init__(self, celeba: Celeba, config: RunConfig) -> None:
        train_rows = np.flatnonzero(celeba.splits == SPLITS.index("train"))
        rows = np.random.default_rng(0).permutation(train_rows)
        self.files = [celeba.images.place / celeba.names[row] for row in rows]
        self.labels = torch.from_numpy(celeba.labels[rows]).float()
        self.crop = with_usual_crop(config.shard, celeba.info).crop
        self.size = config.shard.size
        self.length = len(self.files)  # of one pass; a longer pass starts again at the first file

    @functools.cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The transformations, made by the worker that uses them."""
        t = vision.transforms()
        scale = t.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return t.Compose(
            [t.CenterCrop(self.crop), t.Resize(self.size), t.RandomHorizontalFlip(), t.ToTensor(), scale]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image [3, S, S] in [-1, 1] and labels [40]."""
        index %= len(self.files)
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def rate(batches: Iterable[Sequence], seconds: float, uncounted: int) -> float:
    """Return images per second for `seconds` or until `batches` ends.

    The first `uncounted` batches do not count. batch[0] has one item per image.
    """
    iterator = iter(batches)
    for _ in islice(iterator, uncounted):
        pass
    images = 0
    start = time.perf_counter()
    for batch in iterator:
        images += len(batch[0])
        if time.perf_counter() - start >= seconds:
            break
    return images / (time.perf_counter() - start)


def drop_from_page_cache(files: list[Path]) -> float:
    """Ask the kernel to forget the content of `files`.

    Returns the share of the pages of the first SAMPLED_FILES files that stay in memory.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the kernel keeps pages that are not on the disk yet
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    resident = [resident_pages(file) for file in files[:SAMPLED_FILES]]
    return float(np.mean(np.concatenate(resident)))


def resident_pages(file: Path) -> np.ndarray:
    """Return which pages of a file are in memory, bool [pages], by mincore(2).

    Mapping a file reads nothing.
    """
    mapped = np.memmap(file, np.uint8, "r")
    pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(mapped.ctypes.data)
    result = ctypes.c_void_p(pages.ctypes.data)
    if libc.mincore(address, ctypes.c_size_t(len(mapped)), result):
        raise OSError(ctypes.get_errno(), f"mincore of {file}")
    return (pages & 1).astype(bool)


def ours(batches: TrainBatches, steps: int, seconds: float, uncounted: int, floats: bool) -> float:
    """Return images per second after the prefetch thread, with `floats` also after `to_device`."""
    with closing(Prefetcher(batches.at, 0, steps)) as delivered:
        if not floats:
            return rate((batch[1:] for batch in delivered), seconds, uncounted)
        cpu = torch.device("cpu")
        converted = (batches.to_device(batch, cpu, torch.float32) for batch in delivered)
        return rate(converted, seconds, uncounted)


def open_batches(config: RunConfig) -> TrainBatches:
    """Return the batches of a train stage with one rank. Nothing is read yet."""
    shards = Shards(layout.shards_dir(config), "train", config.data.verify)
    return TrainBatches(
        shards, config.data, config.seed, config.train.batch_size, config.model.z_dim, rank=0, world_size=1
    )


def loader(bench: Bench) -> dict[str, Result]:
    """Measure both loaders on the same images, from the page cache and from the disk."""
    jpegs = JpegFolder(bench.celeba, bench.config)
    size = bench.config.train.batch_size
    baseline = DataLoader(jpegs, size, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    # Every pass runs to its end. Workers of a pass that is left early would go on reading.
    jpegs.length = 8 * size
    rate(baseline, math.inf, 1)  # starts the workers
    jpegs.length = max(4, int(rate(baseline, math.inf, 1) * bench.seconds) // size) * size
    what = (
        f"{len(jpegs.files)} images of {bench.config.shard.size} pixels and 40 labels, shuffled, in "
        f"batches of {size}, counted in the main process. {BASELINE}: PIL, CenterCrop, Resize, "
        f"RandomHorizontalFlip, ToTensor, Normalize in {WORKERS} persistent workers, without their start. "
        "This loader: one prefetch thread, which also draws the encoder's noise; float32: flipped, scaled "
        "to [-1, 1] and channels last by one more thread. "
    )
    with one_thread():  # several threads would wait for the cores that prefetching takes
        return {
            "loader": warm(bench, baseline, jpegs, what),
            "loader_cold": cold(bench, baseline, jpegs, what),
        }


def warm(bench: Bench, baseline: DataLoader, jpegs: JpegFolder, what: str) -> Result:
    """Measure epoch after epoch with all files in the page cache."""
    batches = open_batches(bench.config)
    contenders: Contenders = {
        BASELINE: lambda: rate(baseline, math.inf, 1),
        UINT8: lambda: ours(batches, ENDLESS, bench.seconds, 1, floats=False),
        FLOATS: lambda: ours(batches, ENDLESS, bench.seconds, 1, floats=True),
    }
    measured = measure(contenders, bench.repeats, TARGETS, warm_up=True)
    protocol = what + (
        f"Files in the page cache; about {bench.seconds:g} s per repetition, without its first batch; one "
        "round of warm-up."
    )
    return {"title": "Loader, warm", "unit": "images/s", "protocol": protocol, **measured}


def cold(bench: Bench, baseline: DataLoader, jpegs: JpegFolder, what: str) -> Result:
    """Measure one pass right after the kernel was asked to forget the files."""
    tars = sorted(layout.shards_dir(bench.config).glob("train-*.tar"))
    resident = {"JPEGs": 0.0, "tars": 0.0}
    size = bench.config.train.batch_size
    steps = max(1, len(jpegs.files) // size)
    jpegs.length = min(jpegs.length, steps * size)

    def from_jpegs() -> float:
        resident["JPEGs"] = max(resident["JPEGs"], drop_from_page_cache(jpegs.files))
        return rate(baseline, math.inf, 0)

    def from_tars(floats: bool) -> float:
        drop_from_page_cache(tars)
        # Open new batches after a drop: the kernel keeps pages that an open mapping has touched.
        batches = open_batches(bench.config)
        resident["tars"] = max(resident["tars"], drop_from_page_cache(tars))
        return ours(batches, steps, bench.seconds, 0, floats)

    contenders = {
        BASELINE: from_jpegs,
        UINT8: lambda: from_tars(floats=False),
        FLOATS: lambda: from_tars(floats=True),
    }
    measured = measure(contenders, bench.repeats, TARGETS, warm_up=True)
    protocol = what + (
        f"One pass, cut after about {bench.seconds:g} s, right after POSIX_FADV_DONTNEED on every file. "
        f"The kernel may ignore it: at most {resident['JPEGs']:.1%} of the JPEGs' pages and "
        f"{resident['tars']:.1%} of the tars' were still in memory (mincore). A virtual disk may have its "
        "own cache."
    )
    return {"title": "Loader, cold", "unit": "images/s", "protocol": protocol, **measured}

"""Images per second that reach the main process: this project's loader against torchvision's way with a folder of JPEGs."""

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
from pipeline.data.sources.celeba import SPLITS, Celeba
from pipeline.evaluation import vision
from pipeline.rundir import layout
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure, one_thread

WORKERS = 2  # processes of torch's DataLoader
ENDLESS = 10**9  # steps
SAMPLED_FILES = 500  # whose residency in the page cache is looked at
BASELINE, UINT8, FLOATS = "torchvision, DataLoader", "this loader, uint8", "this loader, float32 on the CPU"
TARGETS = {(UINT8, BASELINE): 50.0, (FLOATS, BASELINE): 25.0}


class JpegFolder(Dataset):
    """torchvision's ImageFolder with CelebA's labels: PIL decodes; torchvision crops, resizes, flips and normalises."""

    def __init__(self, celeba: Celeba, config: RunConfig) -> None:
        rows = np.random.default_rng(0).permutation(np.flatnonzero(celeba.partition == SPLITS.index("train")))
        self.files = [celeba.images / celeba.names[row] for row in rows]
        self.labels = torch.from_numpy(celeba.attributes[rows]).float()
        self.crop, self.size = config.shard.crop, config.shard.size
        self.length = len(self.files)  # of one pass; positions beyond the last file start again at the first

    @functools.cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Made by the worker that uses it."""
        t = vision.transforms()
        scale = t.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return t.Compose(
            [t.CenterCrop(self.crop), t.Resize(self.size), t.RandomHorizontalFlip(), t.ToTensor(), scale]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image [3, S, S] in [-1, 1] and labels [40]."""
        index %= len(self.files)
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def rate(batches: Iterable[Sequence], seconds: float, uncounted: int) -> float:
    """Images per second for `seconds` or to the end of `batches`, after `uncounted` of them; batch[0] has one item per image."""
    iterator = iter(batches)
    for _ in islice(iterator, uncounted):
        pass
    start, images = time.perf_counter(), 0
    for batch in iterator:
        images += len(batch[0])
        if time.perf_counter() - start >= seconds:
            break
    return images / (time.perf_counter() - start)


def drop_from_page_cache(files: list[Path]) -> float:
    """Ask the kernel to forget the content of `files`; returns the share of (some of) their pages that stay in memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on the disk yet are never dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return float(np.mean(np.concatenate([resident_pages(file) for file in files[:SAMPLED_FILES]])))


def resident_pages(file: Path) -> np.ndarray:
    """Which pages of a file are in memory, bool [pages], by mincore(2); mapping a file reads none of it."""
    mapped = np.memmap(file, np.uint8, "r")
    pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(
        ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)
    ):
        raise OSError(ctypes.get_errno(), f"mincore of {file}")
    return (pages & 1).astype(bool)


def ours(batches: TrainBatches, steps: int, seconds: float, uncounted: int, floats: bool) -> float:
    """Images per second behind the prefetch thread; `floats`: behind `to_device` too."""
    with closing(Prefetcher(batches.at, 0, steps)) as delivered:
        if floats:
            return rate(
                (batches.to_device(batch, torch.device("cpu"), torch.float32) for batch in delivered),
                seconds,
                uncounted,
            )
        return rate((batch[1:] for batch in delivered), seconds, uncounted)


def open_batches(config: RunConfig) -> TrainBatches:
    """The batches that one rank of the train stage would read; nothing is read yet."""
    shards = Shards(layout.shards_dir(config), "train", config.data.verify)
    return TrainBatches(
        shards, config.data, config.seed, config.train.batch_size, config.model.z_dim, rank=0, world_size=1
    )


def loader(bench: Bench) -> dict[str, Result]:
    """The same images from the page cache and, as far as the kernel forgets them when asked, from the disk."""
    jpegs, size = JpegFolder(bench.celeba, bench.config), bench.config.train.batch_size
    baseline = DataLoader(jpegs, size, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    # A pass ends by itself: workers of a pass that is left early would go on reading beside the next contender.
    jpegs.length = 8 * size
    rate(baseline, math.inf, 1)  # starts the workers
    jpegs.length = max(4, int(rate(baseline, math.inf, 1) * bench.seconds) // size) * size
    what = (
        f"{len(jpegs.files)} images of {bench.config.shard.size} pixels and 40 labels, shuffled, in batches of {size}, counted in the "
        f"main process. {BASELINE}: PIL, CenterCrop, Resize, RandomHorizontalFlip, ToTensor, Normalize in {WORKERS} persistent workers, "
        f"their start left out. This loader: one prefetch thread, the encoder's noise drawn too; float32: flipped, scaled to [-1, 1], "
        f"channels last, by one thread more. "
    )
    with one_thread():  # a team of threads would wait for the cores that prefetching takes
        return {
            "loader": warm(bench, baseline, jpegs, what),
            "loader_cold": cold(bench, baseline, jpegs, what),
        }


def warm(bench: Bench, baseline: DataLoader, jpegs: JpegFolder, what: str) -> Result:
    """All files in the page cache, epoch after epoch."""
    batches = open_batches(bench.config)
    contenders: Contenders = {
        BASELINE: lambda: rate(baseline, math.inf, 1),
        UINT8: lambda: ours(batches, ENDLESS, bench.seconds, 1, floats=False),
        FLOATS: lambda: ours(batches, ENDLESS, bench.seconds, 1, floats=True),
    }
    protocol = (
        what
        + f"Files in the page cache; about {bench.seconds:g} s per repetition, without its first batch; one round of warm-up."
    )
    return {
        "title": "Loader, warm",
        "unit": "images/s",
        "protocol": protocol,
        **measure(contenders, bench.repeats, TARGETS, warm_up=True),
    }


def cold(bench: Bench, baseline: DataLoader, jpegs: JpegFolder, what: str) -> Result:
    """One pass over files whose content the kernel was asked to forget just before."""
    tars = sorted(layout.shards_dir(bench.config).glob("train-*.tar"))
    size, resident = bench.config.train.batch_size, {"JPEGs": 0.0, "tars": 0.0}
    steps = max(1, len(jpegs.files) // size)
    jpegs.length = min(jpegs.length, steps * size)

    def from_jpegs() -> float:
        resident["JPEGs"] = max(resident["JPEGs"], drop_from_page_cache(jpegs.files))
        return rate(baseline, math.inf, 0)

    def from_tars(floats: bool) -> float:
        drop_from_page_cache(tars)
        batches = open_batches(
            bench.config
        )  # anew, and after a drop: what a mapping has touched cannot be dropped
        resident["tars"] = max(resident["tars"], drop_from_page_cache(tars))
        return ours(batches, steps, bench.seconds, 0, floats)

    contenders = {
        BASELINE: from_jpegs,
        UINT8: lambda: from_tars(floats=False),
        FLOATS: lambda: from_tars(floats=True),
    }
    measured = measure(contenders, bench.repeats, TARGETS, warm_up=True)
    protocol = what + (
        f"One pass, cut after about {bench.seconds:g} s, right after POSIX_FADV_DONTNEED on every file, which is advice: at most "
        f"{resident['JPEGs']:.1%} of the JPEGs' pages and {resident['tars']:.1%} of the tars' were still in memory (mincore); a virtual "
        "disk may have a cache of its own."
    )
    return {"title": "Loader, cold", "unit": "images/s", "protocol": protocol, **measured}

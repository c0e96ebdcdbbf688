"""Images per second that reach the main process: this project's loader against torchvision's way with a folder of JPEGs."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import ctypes
import mmap

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline import layout
from pipeline.config import RunConfig
from pipeline.data.celeba import SPLITS, Celeba
from pipeline.data.loader import Prefetcher, TrainBatches
from pipeline.data.shards import Shards
from pipeline.evaluation import vision
from tools._benchmarks.harness import Bench, Contenders, Result, measure

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
        return t.Compose([t.CenterCrop(self.crop), t.Resize(self.size), t.RandomHorizontalFlip(), t.ToTensor(), scale])

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
    if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)):
        raise OSError(ctypes.get_errno(), f"mincore of {file}")
    return (pages & 1).astype(bool)


def loader(bench: Bench) -> dict[str, Result]:
    """The same images from the page cache and, as far as the kernel forgets them when asked, from the disk."""
    jpegs = JpegFolder(bench.celeba, bench.config)
    baseline = DataLoader(jpegs, bench.config.train.batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    # A pass has a length that fits `seconds`: workers of a pass that is left early would go on reading beside the next contender.
    jpegs.length = 8 * bench.config.train.batch_size
    rate(baseline, math.inf, 1)  # starts the workers
    images_per_s = rate(baseline, math.inf, 1)
    what = f"{len(jpegs.files)} images of {bench.config.shard.size} pixels, shuffled, batches of {bench.config.train.batch_size}"
    return {"loader": warm(bench, baseline, images_per_s, what), "loader_cold": cold(bench, baseline, images_per_s, what)}

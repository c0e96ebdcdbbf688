"""Sharding on one core: this project against PIL, torchvision's transforms and webdataset's writer."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
from PIL import Image

from pipeline.data.sources.base import with_usual_crop
from pipeline.data.workers import write_shards
from pipeline.data.writer import plan_shards
from pipeline.evaluation import vision
from pipeline.runtime.preempt import StopFlag
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure, one_thread
from tools.dev.benchmarks.stages import seconds_of

OURS, PEER = "this project", "PIL, torchvision, webdataset"


def sharding(bench: Bench) -> dict[str, Result]:
    """Measure images per second from JPEGs to tars with images of the training's size."""
    images = len(bench.celeba.names)
    folder = bench.folder / "sharding"

    def ours() -> None:
        list(write_shards(plan_shards(bench.celeba, bench.config.shard, folder), 1, StopFlag()))

    def rate(write: partial[None]) -> float:
        folder.mkdir()
        with one_thread():
            seconds = seconds_of(write)
        shutil.rmtree(folder)
        return images / seconds

    contenders: Contenders = {
        OURS: partial(rate, partial(ours)),
        PEER: partial(rate, partial(write_with_webdataset, bench, folder / "peer-%05d.tar")),
    }
    measured = measure(contenders, bench.repeats, {(OURS, PEER): 2.5}, warm_up=True)
    protocol = (
        f"{images} JPEGs of 178x218 pixels (in the page cache) to {bench.config.shard.size} pixels, one "
        "core. The peer: Image.open, CenterCrop, Resize, numpy, ShardWriter. This project also syncs its "
        "tars to the disk and hashes them."
    )
    return {"sharding": {"title": "Sharding, one core", "unit": "images/s", "protocol": protocol, **measured}}


def write_with_webdataset(bench: Bench, pattern: object) -> None:
    """Write all images as members of tars, as webdataset's documentation shows it."""
    import webdataset

    t = vision.transforms()
    celeba = bench.celeba
    crop = with_usual_crop(bench.config.shard, celeba.info).crop
    transform = t.Compose([t.CenterCrop(crop), t.Resize(bench.config.shard.size)])
    with webdataset.ShardWriter(
        str(pattern), maxcount=bench.config.shard.samples_per_shard, verbose=0
    ) as sink:
        for name, key, labels in zip(celeba.names, celeba.keys, celeba.labels, strict=True):
            with Image.open(celeba.images.place / name) as image:
                pixels = np.asarray(transform(image.convert("RGB")))
            sink.write({"__key__": key, "image.npy": pixels, "attrs.npy": labels})

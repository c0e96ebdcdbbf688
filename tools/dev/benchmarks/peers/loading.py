"""Loading uint8 images and labels: this loader against webdataset, mosaicml-streaming and litdata.

Every peer reads the same 64-pixel images from its own format, in two worker processes. So the
contenders differ in reading and collating, not in decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from pipeline.data.shards import Shards
from pipeline.evaluation import vision
from pipeline.rundir import layout
from tools.dev.benchmarks.harness import Bench, Contenders, Result, measure, one_thread
from tools.dev.benchmarks.loader import (
    BASELINE,
    ENDLESS,
    UINT8,
    WORKERS,
    JpegFolder,
    open_batches,
    ours,
    rate,
)

# litdata makes `spawn` the default of a process. Spawned workers would import torchvision without our help.
WORKING: dict[str, Any] = {
    "num_workers": WORKERS,
    "persistent_workers": True,
    "multiprocessing_context": "fork",
}
EPOCH = 20_000  # images of one pass; the training images are repeated up to about so many
TARGETS = {"webdataset": 20.0, "litdata": 10.0, "mosaicml-streaming": 10.0, BASELINE: 50.0}


def loading(bench: Bench) -> dict[str, Result]:
    """Measure images per second that reach the main process."""
    vision.transforms()  # makes torchvision importable, which two peers import
    shards = Shards(layout.shards_dir(bench.config), "train", bench.config.data.verify)
    images, labels = shards.gather(np.arange(len(shards)))
    repeats = max(1, round(EPOCH * min(1.0, bench.seconds / 3)) // len(shards))
    jpegs = JpegFolder(bench.celeba, bench.config)
    size = bench.config.train.batch_size
    loaders = {
        "webdataset": webdataset_reader(bench, repeats),
        "mosaicml-streaming": streaming_reader(bench, images, labels, repeats),
        "litdata": litdata_reader(bench, images, labels, repeats),
        BASELINE: DataLoader(jpegs, size, shuffle=True, **WORKING),
    }
    batches = open_batches(bench.config)
    contenders: Contenders = {
        UINT8: lambda: ours(batches, ENDLESS, bench.seconds, 1, floats=False),
        **{name: partial(one_pass, loader) for name, loader in loaders.items()},
    }
    targets = {(UINT8, peer): target for peer, target in TARGETS.items()}
    with one_thread():
        measured = measure(contenders, bench.repeats, targets, warm_up=True)
    protocol = (
        f"{len(shards)} images of {bench.config.shard.size} pixels and {labels.shape[1]} labels, shuffled, "
        f"in batches of {size}, counted in the main process; all files in the page cache. Peers: {WORKERS} "
        f"persistent workers and one pass over {repeats * len(shards)} raw uint8 images, without its first "
        f"batch. {BASELINE}: JPEGs, decoded and resized, one pass over {len(jpegs)}. This loader: one thread."
    )
    result = {"title": "Loading, uint8", "unit": "images/s", "protocol": protocol, **measured}
    return {"loading": result}


def one_pass(loader: Iterable[Any]) -> float:
    """Return images per second of a whole pass. Workers of a pass that is left early would go on."""
    return rate(loader, math.inf, 1)


def webdataset_reader(bench: Bench, repeats: int) -> Iterable[Any]:
    """Read this project's own tars, which are webdataset's format."""
    import webdataset

    tars = [str(tar) for tar in sorted(layout.shards_dir(bench.config).glob("train-*.tar"))]
    data = webdataset.WebDataset(tars * repeats, shardshuffle=len(tars), empty_check=False)
    samples = data.shuffle(1000).decode().to_tuple("image.npy", "attrs.npy")
    batched = samples.batched(bench.config.train.batch_size)
    return webdataset.WebLoader(batched, batch_size=None, **WORKING)


def streaming_reader(bench: Bench, images: np.ndarray, labels: np.ndarray, repeats: int) -> Iterable[Any]:
    """Write and read mosaicml-streaming's MDS."""
    from streaming import MDSWriter, StreamingDataset

    folder = str(bench.folder / "mds")
    columns = {name: f"ndarray:uint8:{shape(rows)}" for name, rows in (("image", images), ("attrs", labels))}
    with MDSWriter(out=folder, columns=columns) as writer:
        for row in np.tile(np.arange(len(images)), repeats):
            writer.write({"image": images[row], "attrs": labels[row]})
    size = bench.config.train.batch_size
    data = StreamingDataset(local=folder, shuffle=True, batch_size=size, num_canonical_nodes=1)
    loader = DataLoader(data, size, **WORKING)
    return Values(loader)


def litdata_reader(bench: Bench, images: np.ndarray, labels: np.ndarray, repeats: int) -> Iterable[Any]:
    """Write and read litdata's chunks."""
    import litdata

    folder = bench.folder / "litdata"
    source = bench.folder / "images.npz"
    np.savez(source, images=images, labels=labels)
    rows = np.tile(np.arange(len(images)), repeats).tolist()
    litdata.optimize(
        partial(record, source), rows, str(folder), chunk_bytes="64MB", num_workers=1, start_method="fork"
    )
    data = litdata.StreamingDataset(str(folder), shuffle=True)
    size = bench.config.train.batch_size
    loader = litdata.StreamingDataLoader(data, batch_size=size, **WORKING)
    return Values(loader)


_ARRAYS: dict[Path, tuple[np.ndarray, np.ndarray]] = {}  # of litdata's worker process, which calls `record`


def record(source: Path, row: int) -> dict[str, np.ndarray]:
    """Return one sample as litdata writes it."""
    if source not in _ARRAYS:
        with np.load(source) as arrays:
            _ARRAYS[source] = (arrays["images"], arrays["labels"])
    images, labels = _ARRAYS[source]
    return {"image": images[row], "attrs": labels[row]}


class Values:
    """The batches of a loader of dictionaries, as tuples."""

    def __init__(self, loader: Iterable[dict[str, Any]]) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return (tuple(batch.values()) for batch in self.loader)


def shape(rows: np.ndarray) -> str:
    """Return the shape of one row as streaming writes it, e.g. 64,64,3."""
    return ",".join(str(n) for n in rows.shape[1:])

"""Batches for one rank.

A prefetch thread gathers and ships them as uint8. The device turns them into floats.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import DataConfig
from pipeline.config.suggest import suggest
from pipeline.data.encoded.crops import random_boxes
from pipeline.data.order import NEWEST_STREAM, STREAMS
from pipeline.data.shards import Shards
from pipeline.errors import ConfigError
from pipeline.runtime.split import share

T = TypeVar("T")


class Batch(NamedTuple):
    """This rank's share of one global batch: uint8 images, and its slice of the batch's random numbers."""

    indices: np.ndarray  # [b] positions in the split
    images: Tensor  # uint8 [b, S, S, 3]
    attributes: Tensor  # uint8 [b, A]
    flip: Tensor  # bool [b]
    angle: Tensor  # float32 [b], radians
    noise: Tensor  # float32 [b, D], the encoder's


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale images uint8 [b, S, S, 3] to v / 127.5 - 1, [b, 3, S, S] with channels last in memory."""
    x = images.to(dtype)  # permuting comes last: converting the permuted view is 4 times slower
    minus_one = x.new_full((), -1.0)  # filled on the device: a copy from the host cannot be captured
    return torch.add(minus_one, x, alpha=1 / 127.5, out=x).permute(0, 3, 1, 2)


def flip_images(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror those images [b, S, S, 3] for which `flip` [b] is true.

    Flipping uint8 costs a quarter of the memory traffic of floats. Whole images are picked, because
    torch.where on bytes is 4 times slower on a CPU.
    """
    both = torch.cat((images, images.flip(2)))
    first = torch.arange(len(images), device=images.device)
    return both.index_select(0, torch.where(flip, first + len(images), first))


def rotate_images(x: Tensor, angle: Tensor) -> Tensor:
    """Turn images [b, 3, S, S] by `angle` [b] radians about their centre: bilinear, edge pixels repeated."""
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros_like(angle)
    matrix = torch.stack((cos, -sin, zero, sin, cos, zero), 1).view(-1, 2, 3).to(x.dtype)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def attribute_positions(names: list[str], wanted: list[str]) -> list[int]:
    """Return the positions of the attributes `wanted` among `names`. An empty `wanted` means all.

    Raises ConfigError with the nearest name.
    """
    for name in wanted:
        if name not in names:
            hint = suggest(name, names) or f"; the shards have {', '.join(names)}"
            raise ConfigError(f"key 'data.attributes': unknown attribute {name!r}{hint}")
    return [names.index(name) for name in wanted or names]


class TrainBatches:
    """This rank's share of the batch of any step: a pure function of (seed, step, rank, world size).

    `stream`: a number of pipeline/data/order.py.
    """

    def __init__(
        self,
        shards: Shards,
        config: DataConfig,
        seed: int,
        batch_size: int,
        z_dim: int,
        rank: int,
        world_size: int,
        stream: int = NEWEST_STREAM,
    ) -> None:
        self.shards = shards
        self.config = config
        self.seed = seed
        self.z_dim = z_dim
        self.batch_size = batch_size
        self.share = share(batch_size, rank, world_size)
        self.stream = STREAMS[stream](shards.bounds, seed, config.shards_at_once, batch_size)
        self.positions = attribute_positions(shards.attribute_names, config.attributes)
        if config.random_crop and not shards.can_crop:
            raise ConfigError(
                f"key 'data.random_crop': got {config.random_crop}, expected 0: strided shards hold images "
                "that are cropped already; set shard.format=encoded"
            )

    def at(self, step: int) -> Batch:
        """Return this rank's share of step `step`."""
        first = step * self.batch_size
        mine = range(first + self.share.start, first + self.share.stop)
        indices = self.stream.indices(mine)
        self.shards.expect(self.stream, first)
        images, attributes = self.shards.gather(indices, self._boxes(mine))
        flips, angles = self.stream.augmentation(mine)
        flip = flips < (0.5 if self.config.flip else 0.0)
        angle = angles * np.deg2rad(self.config.rotation_degrees)
        noise = self.stream.noise(mine, self.z_dim)
        return Batch(
            indices,
            torch.from_numpy(images),
            torch.from_numpy(attributes[:, self.positions]),
            torch.from_numpy(flip),
            torch.from_numpy(angle.astype(np.float32)),
            torch.from_numpy(noise),
        )

    def blank(self) -> Batch:
        """Return a batch of black images with the shapes and types of all others."""
        n, size = len(self.share), self.shards.size
        return Batch(
            np.zeros(n, np.int64),
            torch.zeros(n, size, size, 3, dtype=torch.uint8),
            torch.zeros(n, len(self.positions), dtype=torch.uint8),
            torch.zeros(n, dtype=torch.bool),
            torch.zeros(n),
            torch.zeros(n, self.z_dim),
        )

    def _boxes(self, positions: range) -> np.ndarray | None:
        """Return the random crops of these positions of the stream, if there are any."""
        smallest = self.config.random_crop
        return random_boxes(self.seed, positions, smallest) if smallest else None

    def to_device(
        self, batch: Batch, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Copy a batch to `device` and return `to_inputs` of it."""
        return self.to_inputs([tensor.to(device, non_blocking=True) for tensor in batch[1:]], dtype)

    def to_inputs(self, batch: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return x [b, 3, S, S] in [-1, 1], flipped and rotated; y [b, A]; noise [b, D].

        `batch`: the tensors of a `Batch` on the device. The results are of `dtype`.
        """
        images, attributes, flip, angle, noise = batch
        if self.config.flip:
            images = flip_images(images, flip)
        x = to_float(images, dtype)
        if self.config.rotation_degrees and len(x):  # a rank's share may be empty
            x = rotate_images(x, angle)
        return x, attributes.to(dtype), noise.to(dtype)


def pinned(batch: Batch) -> Batch:
    """Copy a batch into page-locked memory. A GPU fetches it from there while it computes."""
    return Batch(batch.indices, *(t.pin_memory() for t in batch[1:]))


class Prefetcher(Generic[T]):
    """Runs `make(step)` for step in [first, last) in a thread, `depth` steps ahead.

    The consumer raises the errors of the thread.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int, depth: int = 3) -> None:
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, first, last), daemon=True)
        self._thread.start()

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _work(self, make: Callable[[int], T], first: int, last: int) -> None:
        try:
            for step in range(first, last):
                if self._stop.is_set():
                    return
                self._put(make(step))
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def __iter__(self) -> Iterator[T]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join()

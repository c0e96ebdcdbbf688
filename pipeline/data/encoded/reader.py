"""One split of encoded shards as an array of samples, decoded when they are read."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.data.encoded.ahead import Ahead, least_room
from pipeline.data.encoded.cache import NodeCache
from pipeline.data.encoded.crops import cut_box
from pipeline.data.encoded.index import Index, read_index
from pipeline.data.order import Stream
from pipeline.data.pixels import crop_centre, resize
from pipeline.data.shards import Shards, map_verified
from pipeline.data.sources.base import ImageError
from pipeline.data.sources.decode import decode
from pipeline.errors import ConfigError, DataError

REMOTE_READS = 16  # single images that are read from a store at a time
REMEMBERED = 1 << 28  # bytes of single images that are kept: every validation reads the same ones


class EncodedShards(Shards):
    """A split whose tars hold image files; the tars lie in a folder, or behind the URL of a cache.

    Decoding, cropping and resizing give the very pixels that a strided tar would hold. Threads share the
    work: libjpeg and the resizing release the interpreter lock.
    A tar behind a URL is verified when it is fetched. Samples that nobody announced by `expect`
    are read alone.
    """

    can_crop: ClassVar[bool] = True

    def __init__(
        self,
        folder: Path,
        split: str,
        verify: str = "once",
        damaged: str = "stop",
        tars: Path | NodeCache | None = None,
    ) -> None:
        self.tars = folder if tars is None else tars
        super().__init__(folder, split, verify, damaged)
        threads = REMOTE_READS if isinstance(self.tars, NodeCache) else torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._ahead: Ahead | None = None
        self._soon: dict[int, int] = {}  # shards that are fetched ahead -> where they are read first
        self._read_ahead: set[int] = set()  # shards that the kernel was asked to read
        self._remembered: dict[tuple[int, int], bytes] = {}
        self._remembered_bytes = 0

    def _open_one(self, entry: dict[str, Any], verify: str) -> tuple[Index, mmap.mmap | None]:
        index = read_index(self.folder, entry, len(self.attribute_names))
        if isinstance(self.tars, NodeCache):
            return index, None
        return index, map_verified(self.tars / entry["file"], entry, verify)

    def _arrange(self, opened: list[Any], samples: list[int]) -> None:
        self._indices: list[Index] = [index for index, _ in opened]
        self._mapped: dict[int, mmap.mmap] = {}
        for shard, (_, mapped) in enumerate(opened):
            if mapped is not None:
                self._mapped[shard] = mapped
        self._labels = np.concatenate([index.labels for index in self._indices])

    def expect(self, stream: Stream, first: int) -> None:
        """Fetch ahead what `stream` reads from element `first` on; forget the tars that it has left."""
        cache = self.tars
        if not isinstance(cache, NodeCache):
            return
        if self._ahead is None or self._ahead.stream is not stream:
            self._ahead = self._follow(stream, cache)
        soon = self._ahead.at(first)
        if soon != self._soon:
            self._soon = soon
            for shard in self._mapped.keys() - set(soon):
                self._mapped.pop(shard, None)  # an open mapping would keep a deleted tar on the disk
            cache.want([(self.entries[shard], place) for shard, place in soon.items()])

    def _follow(self, stream: Stream, cache: NodeCache) -> Ahead:
        bytes_of = [entry["bytes"] for entry in self.entries]
        needed = least_room(bytes_of, stream.shards_at_once)
        if needed > cache.limit:
            raise ConfigError(
                f"key 'data.cache_gb': {cache.limit / 1e9:.3g}, expected at least {needed / 1e9:.3g}: two "
                f"groups of data.shards_at_once={stream.shards_at_once} tars; lower that key, "
                "or make smaller shards"
            )
        return Ahead(stream, bytes_of, cache.limit)

    def gather(self, indices: np.ndarray, boxes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples at positions `indices` [n], in that order.

        Gives images uint8 [n, S, S, 3] and attributes uint8 [n, A]. `boxes` [n, 4] are those of
        `random_boxes`, within each image's centred square; None means the whole square.
        Raises IndexError, DataError.
        """
        shard_of, row_of = self._locate(indices)
        images = np.empty((len(shard_of), self.size, self.size, 3), np.uint8)

        def load(i: int) -> None:
            box = None if boxes is None else boxes[i]
            images[i] = self._pixels(int(shard_of[i]), int(row_of[i]), box)

        if isinstance(self.tars, NodeCache):
            for shard in dict.fromkeys(shard_of.tolist()):
                self._map(shard)
        if self._pool is None or len(images) < 2:
            for i in range(len(images)):
                load(i)
        else:
            for _ in self._pool.map(load, range(len(images))):
                pass
        return images, self._labels[np.asarray(indices, np.int64)]

    def _map(self, shard: int) -> None:
        """Map a tar that is expected, or that is in the cache already."""
        cache, entry = self.tars, self.entries[shard]
        assert isinstance(cache, NodeCache)
        if shard in self._mapped:
            return
        expected = self._ahead is not None and shard in self._soon
        while expected and (file := cache.wait(entry)) is not None:
            try:
                with file.open("rb") as opened:
                    self._mapped[shard] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                return
            except FileNotFoundError:
                continue  # a slower rank needed its room just now

    def _pixels(self, shard: int, row: int, box: np.ndarray | None) -> np.ndarray:
        """Return one image, uint8 [S, S, 3]."""
        try:
            square = crop_centre(decode(self.content(shard, row)), self.crop)
        except ImageError as error:
            key = self._indices[shard].keys[row]
            raise DataError(f"{self.entries[shard]['file']}: the image {key} {error}") from None
        if box is not None:
            square = cut_box(square, box)
        return resize(np.ascontiguousarray(square)[None], self.size)[0]

    def content(self, shard: int, row: int) -> bytes:
        """Return the file of one image."""
        index = self._indices[shard]
        start = int(index.offsets[row])
        stop = start + int(index.lengths[row])
        mapped = self._mapped.get(shard)
        if mapped is not None:
            if shard not in self._read_ahead:
                self._read_ahead.add(shard)  # random rows from a cold disk are slow
                mapped.madvise(mmap.MADV_WILLNEED)
            return mapped[start:stop]
        if (shard, row) in self._remembered:
            return self._remembered[shard, row]
        assert isinstance(self.tars, NodeCache)
        content = self.tars.remote.read(self.entries[shard]["file"], start, stop)
        if self._remembered_bytes < REMEMBERED:
            self._remembered[shard, row] = content
            self._remembered_bytes += len(content)
        return content

    def close(self) -> None:
        """Stop fetching ahead."""
        if isinstance(self.tars, NodeCache):
            self.tars.close()

    def attributes(self) -> np.ndarray:
        """Return the attributes of the whole split, uint8 [N, A]."""
        return self._labels

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return the keys of the samples at positions `indices`."""
        shard_of, row_of = self._locate(indices)
        pairs = zip(shard_of.tolist(), row_of.tolist(), strict=True)
        return [self._indices[shard].keys[row] for shard, row in pairs]

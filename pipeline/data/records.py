"""The bytes of one sample in a tar.

Each sample is two members of fixed size, so every record has one length and the tar is an array:
`<key>.attrs.npy` (uint8 [A], 0 or 1), then `<key>.image.npy` (uint8 [S, S, 3], C order).
The tar is plain ustar with mtime and owner 0.
"""

from __future__ import annotations

import re
import tarfile
from functools import lru_cache

import numpy as np

from pipeline.runtime.split import ceil_div

# WebDataset ends a key at the first dot. A longer or non-ASCII name would need a second tar header.
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
TAIL = bytes(1024)  # the two zero blocks that end a tar
BLOCK = 512
NPY_HEADER = 128
NAME_BYTES = 100  # of a member, in a tar header
_CHECKSUM = slice(148, 154)  # six octal digits in a tar header


def padded(length: int) -> int:
    """Round up to whole tar blocks."""
    return ceil_div(length, BLOCK) * BLOCK


def tar_header(name: str, length: int) -> bytes:
    """Return the ustar header of one member. Its name is ASCII of at most 100 bytes."""
    field = name.encode("ascii")
    assert len(field) <= NAME_BYTES, name
    nameless = _nameless_header(length)
    checksum = b"%06o" % (int(nameless[_CHECKSUM], 8) + sum(field))  # of all bytes of the header
    return field + nameless[len(field) : _CHECKSUM.start] + checksum + nameless[_CHECKSUM.stop :]


@lru_cache(maxsize=8192)
def _nameless_header(length: int) -> bytes:
    """Return the header of a member without a name. tarfile takes longer for one than a resize takes."""
    member = tarfile.TarInfo()  # mode 0644; mtime, uid and gid 0; no owner name
    member.size = length
    return member.tobuf(tarfile.USTAR_FORMAT)


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return NumPy's header 1.0 of a uint8 array in C order. No NumPy version can change these bytes."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    room = NPY_HEADER - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n"


class RecordFormat:
    """Offsets and headers of records with `attributes` labels and one image of `size` x `size` pixels."""

    def __init__(self, size: int, attributes: int) -> None:
        self.attrs_shape = (attributes,)
        self.image_shape = (size, size, 3)
        self.attrs_bytes = attributes
        self.image_bytes = size * size * 3
        self.attrs_at = BLOCK + NPY_HEADER
        self._image_member = BLOCK + padded(NPY_HEADER + self.attrs_bytes)
        self.image_at = self._image_member + BLOCK + NPY_HEADER
        self.length = self._image_member + BLOCK + padded(NPY_HEADER + self.image_bytes)

    def headers(self, key: str) -> list[tuple[int, bytes]]:
        """Return (offset in the record, bytes) of the two tar headers and the two npy headers."""
        second = self._image_member
        return [
            (0, tar_header(f"{key}.attrs.npy", NPY_HEADER + self.attrs_bytes)),
            (BLOCK, npy_header(self.attrs_shape)),
            (second, tar_header(f"{key}.image.npy", NPY_HEADER + self.image_bytes)),
            (second + BLOCK, npy_header(self.image_shape)),
        ]

    def pack(self, keys: list[str], attributes: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Pack n samples: keys, uint8 [n, A] and uint8 [n, S, S, 3] -> records uint8 [n, length]."""
        records = np.zeros((len(keys), self.length), np.uint8)
        for record, key in zip(records, keys, strict=True):
            for at, header in self.headers(key):
                record[at : at + len(header)] = np.frombuffer(header, np.uint8)
        attrs_end = self.attrs_at + self.attrs_bytes
        image_end = self.image_at + self.image_bytes
        records[:, self.attrs_at : attrs_end] = attributes
        records[:, self.image_at : image_end] = images.reshape(len(keys), self.image_bytes)
        return records

    def attributes_of(self, tar: np.ndarray, samples: int) -> np.ndarray:
        """View the attributes of all records of a tar (its bytes, uint8): strided, opaque items [samples]."""
        opaque = np.dtype(("V", self.attrs_bytes))
        return np.ndarray((samples,), opaque, tar, self.attrs_at, (self.length,))  # type: ignore[arg-type]

    def members_of(self, tar: np.ndarray, samples: int) -> np.ndarray:
        """View the names of the attributes' members as strided bytes [samples]; see `key_of`."""
        return np.ndarray((samples,), "S100", tar, 0, (self.length,))  # type: ignore[arg-type]


def key_of(member: bytes) -> str:
    """Return the key in the name of an attributes' member, or "" if it is no such name."""
    name = member.decode("ascii", "replace")
    key = name.removesuffix(".attrs.npy")
    if key == name or not KEY.fullmatch(key):
        return ""
    return key

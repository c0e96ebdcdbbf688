"""Bytes of one sample in a tar: two members of fixed size, so that every record has one length and the tar is an array.

`<key>.attrs.npy` (uint8 [A], 0 or 1) comes first, then `<key>.image.npy` (uint8 [S, S, 3], C order); plain ustar, mtime and owner 0.
"""

from __future__ import annotations

import re
import tarfile

import numpy as np

from pipeline.runtime.split import ceil_div

KEY = re.compile(
    r"[A-Za-z0-9_-]{1,90}"
)  # a dot would end WebDataset's key; a longer or non-ASCII name needs a second tar header
TAIL = bytes(1024)  # the two zero blocks that end a tar
_BLOCK = 512
_NPY_HEADER = 128


def _padded(length: int) -> int:
    return ceil_div(length, _BLOCK) * _BLOCK


def _tar_header(name: str, length: int) -> bytes:
    member = tarfile.TarInfo(name)  # mode 0644, mtime, uid and gid 0, no owner's name
    member.size = length
    return member.tobuf(tarfile.USTAR_FORMAT)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """NumPy's format 1.0 for a uint8 array in C order; spelled out so that no numpy version can change it."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    room = _NPY_HEADER - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n"


class RecordFormat:
    """Offsets and headers of records that hold `attributes` labels and one image of `size` x `size` pixels."""

    def __init__(self, size: int, attributes: int) -> None:
        self.attrs_shape, self.image_shape = (attributes,), (size, size, 3)
        self.attrs_bytes, self.image_bytes = attributes, size * size * 3
        self.attrs_at = _BLOCK + _NPY_HEADER
        self._image_member = _BLOCK + _padded(_NPY_HEADER + self.attrs_bytes)
        self.image_at = self._image_member + _BLOCK + _NPY_HEADER
        self.length = self._image_member + _BLOCK + _padded(_NPY_HEADER + self.image_bytes)

    def headers(self, key: str) -> list[tuple[int, bytes]]:
        """(offset in the record, bytes) of the two tar and two npy headers."""
        second = self._image_member
        return [
            (0, _tar_header(f"{key}.attrs.npy", _NPY_HEADER + self.attrs_bytes)),
            (_BLOCK, _npy_header(self.attrs_shape)),
            (second, _tar_header(f"{key}.image.npy", _NPY_HEADER + self.image_bytes)),
            (second + _BLOCK, _npy_header(self.image_shape)),
        ]

    def pack(self, keys: list[str], attributes: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Records of n samples: keys, uint8 [n, A] and uint8 [n, S, S, 3] -> uint8 [n, length]."""
        records = np.zeros((len(keys), self.length), np.uint8)
        for record, key in zip(records, keys, strict=True):
            for at, header in self.headers(key):
                record[at : at + len(header)] = np.frombuffer(header, np.uint8)
        records[:, self.attrs_at : self.attrs_at + self.attrs_bytes] = attributes
        records[:, self.image_at : self.image_at + self.image_bytes] = images.reshape(
            len(keys), self.image_bytes
        )
        return records

    def column(self, tar: np.ndarray, samples: int, at: int, length: int) -> np.ndarray:
        """One field of all records of a tar (its bytes, uint8) as a strided view [samples] of opaque items of `length` bytes."""
        return np.ndarray((samples,), np.dtype(("V", length)), tar, at, (self.length,))  # type: ignore[arg-type]

    def keys(self, tar: np.ndarray, samples: int) -> np.ndarray:
        """Member names of the attributes as a strided view, bytes [samples]; see `key_of`."""
        return np.ndarray((samples,), "S100", tar, 0, (self.length,))  # type: ignore[arg-type]


def key_of(member: bytes) -> str:
    """Key of a sample from the name of its attributes member; an empty text where it is no such name."""
    key = member.decode("ascii", "replace").removesuffix(".attrs.npy")
    return key if KEY.fullmatch(key) and len(key) < len(member) else ""

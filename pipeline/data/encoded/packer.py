"""The bytes of an encoded tar: each sample is `<key>.attrs.npy` and the image's own file.

The attributes are the same member as in a strided tar, so WebDataset reads both alike.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data.encoded.index import Index
from pipeline.data.records import BLOCK, npy_header, padded, tar_header
from pipeline.data.sources.base import ImageError, ImageReader
from pipeline.data.sources.decode import decode

ENDINGS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}  # first two bytes of a file: its ending


def image_file(images: ImageReader, name: str) -> tuple[bytes, np.ndarray]:
    """Return a file that `decode` turns into the pixels of an image, and the pixels.

    It is the image's own file where that is possible, and a PNG otherwise: a reader may turn an image
    or change its colours. Raises ImageError.
    """
    pixels = images.read(name)
    read_bytes = getattr(images, "read_bytes", None)
    if read_bytes is not None:
        content: bytes = read_bytes(name)
        if _decodes_to(content, pixels):
            return content, pixels
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue(), pixels


def _decodes_to(content: bytes, pixels: np.ndarray) -> bool:
    try:
        return content[:2] in ENDINGS and np.array_equal(decode(content), pixels)
    except ImageError:
        return False


class EncodedTar:
    """Packs samples one after another, and notes where each image lies."""

    def __init__(self) -> None:
        self.length = 0  # bytes so far
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.labels: list[np.ndarray] = []
        self.keys: list[str] = []

    def pack(self, key: str, attributes: np.ndarray, content: bytes) -> bytes:
        """Return the two members of one sample: attributes uint8 [A] and an image file."""
        array = npy_header(attributes.shape) + attributes.tobytes()
        first = _member(f"{key}.attrs.npy", array)
        second = _member(f"{key}.{ENDINGS[content[:2]]}", content)
        self.offsets.append(self.length + len(first) + BLOCK)
        self.lengths.append(len(content))
        self.labels.append(attributes)
        self.keys.append(key)
        self.length += len(first) + len(second)
        return first + second

    def index(self) -> Index:
        """Return the index of all samples."""
        return Index(np.array(self.offsets), np.array(self.lengths), np.stack(self.labels), self.keys)


def _member(name: str, content: bytes) -> bytes:
    padding = padded(len(content)) - len(content)
    return tar_header(name, len(content)) + content + bytes(padding)

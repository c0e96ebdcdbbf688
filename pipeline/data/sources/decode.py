"""Image file -> pixels. The size is checked before anything is decoded."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.data.sources.base import ImageError

MAX_PIXELS = 1 << 26  # a few bytes can announce an image that fills the memory
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"


def decode(content: bytes, expected: tuple[int, int] | None = None) -> np.ndarray:
    """Return the pixels of a JPEG or PNG file, uint8 [H, W, 3]; grey becomes RGB. Raises ImageError.

    The size is checked against `expected` (height, width) and MAX_PIXELS before anything is decoded.
    Decoding is strict: libjpeg would fill the rest of a truncated image with grey.
    """
    if not content:
        raise ImageError("is empty")
    if content.startswith(_JPEG):
        return _decode_jpeg(content, expected)
    if content.startswith(_PNG):
        return _decode_png(content, expected)
    raise ImageError("is not a JPEG or PNG file")


def _decode_jpeg(content: bytes, expected: tuple[int, int] | None) -> np.ndarray:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
        _require_size(height, width, expected)
        return simplejpeg.decode_jpeg(content, "RGB")
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(f"is a damaged or truncated JPEG ({error})") from None


def _decode_png(content: bytes, expected: tuple[int, int] | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            _require_size(height, width, expected)
            return np.array(image.convert("RGB"))
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"is a damaged or truncated PNG ({error})") from None


def _require_size(height: int, width: int, expected: tuple[int, int] | None) -> None:
    if expected is not None and (height, width) != expected:
        raise ImageError(f"is {width}x{height} pixels, expected {expected[1]}x{expected[0]}")
    if height * width > MAX_PIXELS:
        raise ImageError(f"is {width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} million")

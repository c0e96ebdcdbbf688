"""Image file -> pixels. The size is checked before anything is decoded."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from PIL.Image import Transpose

from pipeline.data.sources.base import ImageError

MAX_PIXELS = 1 << 26  # a few bytes can announce an image that fills the memory
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_RIFF = b"RIFF"
_WEBP = b"WEBP"
_EXIF_WITHIN = 1 << 16  # bytes; the Exif block is one of a JPEG's first segments
_ORIENTATION = 0x0112  # Exif tag; 1: upright
_TURNS = {  # value of the tag -> what turns the image upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255, 255)


def read_image_file(file: Path, most: int) -> bytes:
    """Return the content of an image file. Raises ImageError if it is unreadable or has over `most` bytes."""
    try:
        with file.open("rb") as opened:
            # read(most) would allocate that much memory for every file of a few kB.
            size = os.fstat(opened.fileno()).st_size
            if size > most:
                raise ImageError(f"is larger than {most} bytes")
            return opened.read(size)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None


def decode(content: bytes, expected: tuple[int, int] | None = None) -> np.ndarray:
    """Return the pixels of a JPEG, PNG or WebP file, uint8 [H, W, 3]. Raises ImageError.

    Grey, palette and CMYK become RGB. Transparent pixels are laid over white. An image that a camera
    stored on its side is turned upright. Of an animation, the first picture counts.
    The size is checked against `expected` (height, width) and MAX_PIXELS before anything is decoded.
    Decoding is strict: libjpeg would fill the rest of a truncated image with grey.
    """
    if not content:
        raise ImageError("is empty")
    if content.startswith(_JPEG):
        return _decode_jpeg(content, expected)
    if content.startswith(_PNG):
        return _decode_with_pil(content, "PNG", expected)
    if content.startswith(_RIFF) and content[8:12] == _WEBP:
        return _decode_with_pil(content, "WEBP", expected)
    raise ImageError("is not a JPEG, PNG or WebP file")


def _decode_jpeg(content: bytes, expected: tuple[int, int] | None) -> np.ndarray:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        _require_size(height, width, expected)
        if colours in ("CMYK", "YCCK") or _is_turned(content):  # more than libjpeg alone can do
            return _decode_with_pil(content, "JPEG", expected)
        return simplejpeg.decode_jpeg(content, "RGB")
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(f"is a damaged or truncated JPEG ({error})") from None


def _is_turned(content: bytes) -> bool:
    """Return whether the Exif block of a JPEG says that it is not upright. A broken block says nothing."""
    if b"Exif\0\0" not in content[:_EXIF_WITHIN]:
        return False
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            return _turn(image) is not None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _turn(image: Image.Image) -> Transpose | None:
    """Return what turns an image upright, or None. A broken Exif block says nothing."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises another kind of error for each kind of damage
        return None


def _decode_with_pil(content: bytes, form: str, expected: tuple[int, int] | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=[form]) as image:
            width, height = image.size
            _require_size(height, width, expected)
            image.load()
            turn = _turn(image)  # `ImageOps.exif_transpose` also rewrites the block, which may be odd
            return np.array(_to_rgb(image if turn is None else image.transpose(turn)))
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"is a damaged or truncated {form.replace('WEBP', 'WebP')} ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey; PIL would cut off the bright ones
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, _WHITE), seen).convert("RGB")
    return image.convert("RGB")


def _require_size(height: int, width: int, expected: tuple[int, int] | None) -> None:
    if expected is not None and (height, width) != expected:
        raise ImageError(f"is {width}x{height} pixels, expected {expected[1]}x{expected[0]}")
    if height * width > MAX_PIXELS:
        raise ImageError(f"is {width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} million")

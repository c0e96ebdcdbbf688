"""Change attributes of a photo.

The photo must show one face, upright and centred, as in the training images. Its centre is cut out as
theirs was, and resized. The picture shows from left to right the photo, its reconstruction (before),
the edited image (after) and their difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from cvae.io import Card
from cvae.use import Model, parse_request
from pipeline.command_line import add_device, add_model, add_out, parser
from pipeline.data.grids import grid
from pipeline.data.pixels import crop_centre, resize
from pipeline.data.sources.base import ImageError
from pipeline.data.sources.decode import decode
from pipeline.errors import DataError, exit_code
from tools.export import open_model, user_errors
from tools.sample import require_picture_name, save_picture

EXAMPLES = """\
  python tools/edit.py runs/sigma_cvae_nf photo.jpg Eyeglasses=1 --out edited.png
  python tools/edit.py runs/sigma_cvae_nf photo.jpg Smiling=0 --attributes Smiling,!Male --crop 150
"""


def read_photo(file: Path, card: Card, crop: int = 0) -> np.ndarray:
    """Return a photo as the model sees it, uint8 [1, S, S, 3]. Raises DataError.

    `crop` is the side of the centred square, pixels; see `crop_side` for 0.
    """
    try:
        photo = decode(file.read_bytes())
        square = crop_centre(photo, crop or crop_side(photo.shape[0], photo.shape[1], card))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except ImageError as error:
        raise DataError(f"{file}: {error}") from None
    return resize(np.ascontiguousarray(square)[None], card.size)


def crop_side(height: int, width: int, card: Card) -> int:
    """Return the side of the square to cut, pixels.

    It is the training images' share of the shorter side. An image that already has the model's size
    is not cut.
    """
    shorter = min(height, width)
    if height == width == card.size or card.native_size is None:
        return shorter
    return max(1, round(shorter * card.crop / min(card.native_size)))


def strip(model: Model, photo: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Return photo, reconstruction, edited image and difference, uint8 [4, S, S, 3]."""
    request = parse_request(args.request)
    opposites = {name: 1 - value for name, value in request.items()}
    known = opposites | parse_request(args.attributes)
    before = model.edit(photo, {}, known).numpy()
    after = model.edit(photo, request, known, args.strength).numpy()
    difference = np.abs(after.astype(np.int16) - before).astype(np.uint8)
    return np.concatenate([photo, before, after, difference])


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/edit.py", __doc__, EXAMPLES)
    add_model(words)
    add = words.add_argument
    add("photo", metavar="PHOTO", type=Path, help="JPEG or PNG file")
    add("request", metavar="REQUEST", help='for example Eyeglasses=1 or "Smiling,!Young"')
    add("--attributes", metavar="A,B", default="", help="what the photo shows, e.g. Male,!Smiling")
    add("--strength", metavar="S", type=float, default=1.0, help="above 1: a stronger change")
    crop = "side of the square to cut, pixels; 0: as the training images"
    add("--crop", metavar="N", type=int, default=0, help=crop)
    add_device(words)
    add_out(words, "the picture to write (.png, .jpg)", "edited.png")
    args = words.parse_args(argv)
    require_picture_name(args.out)
    model = open_model(args.model, args.device)
    photo = read_photo(args.photo, model.card, args.crop)
    with user_errors():
        images = strip(model, photo, args)
    save_picture(grid(images, len(images)), args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Change attributes of a photo.

With --eyes the photo is turned, scaled and cut until its eyes lie where those of the training images do.
Without, its centre is cut out; the photo must then show one face, upright and centred. The picture shows
from left to right the photo, its reconstruction (before), the edited image (after) and their difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from cvae.request import parse_request
from cvae.use import Model
from pipeline.command_line import add_device, add_model, add_out, parser
from pipeline.data.grids import enlarged, grid
from pipeline.errors import exit_code
from tools.export import open_model, user_errors
from tools.parts.photo import parse_eyes, read_photo
from tools.sample import require_picture_name, save_picture

EXAMPLES = """\
  python tools/edit.py runs/sigma_cvae_nf photo.jpg Eyeglasses=1 --eyes 310,420,402,415
  python tools/edit.py runs/sigma_cvae_nf photo.jpg Smiling=0 --attributes 'Smiling,!Male' --crop 150
"""


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
    add("request", metavar="REQUEST", help="for example Eyeglasses=1 or 'Smiling,!Young'")
    add("--attributes", metavar="A,B", default="", help="what the photo shows, e.g. 'Male,!Smiling'")
    add("--strength", metavar="S", type=float, help="above 1: a stronger change (default: as evaluated)")
    place = words.add_mutually_exclusive_group()
    middle = "the middle of both eyes, pixels"
    place.add_argument("--eyes", metavar="X1,Y1,X2,Y2", default="", help=middle)
    crop = "side of the centred square to cut, pixels; 0: as the training images"
    place.add_argument("--crop", metavar="N", type=int, default=0, help=crop)
    add_device(words)
    add_out(words, "the picture to write (.png, .jpg)", "edited.png")
    args = words.parse_args(argv)
    require_picture_name(args.out)
    eyes = parse_eyes(args.eyes)
    model = open_model(args.model, args.device)
    photo = read_photo(args.photo, model.card, args.crop, eyes)
    with user_errors():
        images = strip(model, photo, args)
    save_picture(grid(enlarged(images), len(images)), args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))

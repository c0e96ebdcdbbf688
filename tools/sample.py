"""Draw faces with attributes.

!NAME asks for an image without the attribute.
Attributes that are not named are taken from training images that carry the named ones.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from cvae.use import BATCH, Model, parse_request
from pipeline.command_line import add_device, add_model, add_out, add_seed, parser
from pipeline.data.grids import grid, save_png
from pipeline.errors import UserError, exit_code
from pipeline.rundir.files import write_bytes
from tools.export import open_model, user_errors

EXAMPLES = """\
  python tools/sample.py runs/sigma_cvae_nf "Male,Heavy_Makeup,!Smiling" --n 16 --out grid.png
  python tools/sample.py runs/sigma_cvae_nf Eyeglasses --n 200 --out eyeglasses
"""
MAX_GRID = 4096  # images in one picture
FORMATS = (".png", ".jpg", ".jpeg")


def require_picture_name(file: Path) -> None:
    """Raise UserError if the file's name has no ending of a picture."""
    if file.suffix.lower() not in FORMATS or file.is_dir():
        raise UserError(f"--out {file}: expected the name of a picture, {', '.join(FORMATS)}")


def save_picture(picture: Image.Image, file: Path) -> None:
    """Write a picture as PNG or JPEG, by the ending of its name."""
    content = io.BytesIO()
    picture.save(content, "PNG" if file.suffix.lower() == ".png" else "JPEG", quality=95)
    write_bytes(file, content.getvalue())


def draw(model: Model, args: argparse.Namespace) -> None:
    """Draw the images block by block; write each to a folder, or all as one grid."""
    request = parse_request(args.request)
    as_grid = args.out.suffix != "" and not args.out.is_dir()
    if as_grid:
        require_picture_name(args.out)
    if as_grid and args.n > MAX_GRID:
        raise UserError(f"--n {args.n}: a grid shows at most {MAX_GRID} images; give a folder as --out")
    if args.n < 1:
        raise UserError(f"--n {args.n}: expected at least 1")
    if not as_grid:
        args.out.mkdir(parents=True, exist_ok=True)
    kept = []
    quiet = args.n <= BATCH or not sys.stderr.isatty()
    with tqdm(total=args.n, unit="image", disable=quiet) as bar:
        for start in range(0, args.n, BATCH):
            n = min(BATCH, args.n - start)
            images = model.sample(request, n, args.seed, args.temperature, args.guidance, start).numpy()
            if as_grid:
                kept.append(images)
            else:
                for number, image in enumerate(images, start):
                    save_png(Image.fromarray(image), args.out / f"{number:06d}.png")
            bar.update(n)
    if as_grid:
        columns = min(16, math.ceil(math.sqrt(args.n)))
        save_picture(grid(np.concatenate(kept), columns), args.out)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/sample.py", __doc__, EXAMPLES)
    add_model(words)
    add = words.add_argument
    add("request", metavar="REQUEST", nargs="?", default="", help='for example "Male,!Smiling"')
    add("--n", metavar="N", type=int, default=16, help="number of images")
    add_seed(words, "same seed, same images")
    add("--temperature", metavar="T", type=float, default=1.0, help="scale of the noise; below 1: tamer")
    add("--guidance", metavar="G", type=float, default=1.0, help="above 1: follow the request more closely")
    add_device(words)
    add_out(words, "a picture (.png, .jpg), or a folder for single images", "grid.png")
    args = words.parse_args(argv)
    model = open_model(args.model, args.device)
    with user_errors():
        draw(model, args)
    print(args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))

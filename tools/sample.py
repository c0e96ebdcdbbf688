"""Draw faces with attributes.

!NAME asks for an image without the attribute.
Attributes that are not named are taken from training images that carry the named ones.

`--background beach.jpg` puts a picture behind faces of a model that was trained with
shard.background=green; other faces stay as they are.

`--out grid.png` writes one picture, with small images enlarged. A folder gets single files as they are,
and images.csv with the attributes of each. `--requests batch.csv` asks for many faces at once; its
columns are names of attributes (1, 0 or empty) and, if you like, n and seed.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvae.request import parse_request
from cvae.use import BATCH, Model
from pipeline.command_line import add_device, add_model, add_out, add_seed, parser
from pipeline.data.grids import enlarged, grid, save_png
from pipeline.data.pixels import crop_centre, put_behind, resize
from pipeline.data.sources.base import ImageError
from pipeline.data.sources.decode import decode
from pipeline.errors import DataError, UserError, exit_code
from pipeline.rundir.files import write_bytes
from tools.export import open_model, user_errors

EXAMPLES = """\
  python tools/sample.py runs/sigma_cvae_nf 'Male,Heavy_Makeup,!Smiling' --n 16 --out grid.png
  python tools/sample.py runs/sigma_cvae_nf Eyeglasses --n 200 --out eyeglasses
  python tools/sample.py runs/sigma_cvae_nf --requests batch.csv --out many
  python tools/sample.py runs/sharp_foreground Smiling --background beach.jpg
"""
MAX_GRID = 4096  # images in one picture
FORMATS = (".png", ".jpg", ".jpeg")
INDEX = "images.csv"


@dataclass(frozen=True)
class Order:
    """What one line of a batch asks for."""

    request: dict[str, int]
    n: int
    seed: int


def require_picture_name(file: Path) -> None:
    """Raise UserError if the file's name has no ending of a picture."""
    if file.suffix.lower() not in FORMATS or file.is_dir():
        raise UserError(f"--out {file}: expected the name of a picture, {', '.join(FORMATS)}")


def require_folder(folder: Path) -> None:
    """Raise UserError if a file lies where `folder`, or one above it, is or would be made."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"--out: {place} is a file, expected a folder; give another name")


def save_picture(picture: Image.Image, file: Path) -> None:
    """Write a picture as PNG or JPEG, by the ending of its name."""
    content = io.BytesIO()
    picture.save(content, "PNG" if file.suffix.lower() == ".png" else "JPEG", quality=95)
    write_bytes(file, content.getvalue())


def read_orders(file: Path, n: int, seed: int) -> list[Order]:
    """Read a CSV file of requests; `n` and `seed` hold for lines that do not say them. Raises DataError."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            lines = list(csv.DictReader(opened))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: is not a CSV file ({error})") from None
    orders = []
    for number, line in enumerate(lines, 2):
        try:
            given = {name.strip(): value.strip() for name, value in line.items() if value and value.strip()}
            own_n, own_seed = int(given.pop("n", n)), int(given.pop("seed", seed))
            request = {name: int(value) for name, value in given.items()}
        except (ValueError, AttributeError):
            raise DataError(
                f"{file}: line {number}: expected numbers under the names of the first line"
            ) from None
        orders.append(Order(request, own_n, own_seed))
    if not orders:
        raise DataError(f"{file}: no request in it; the first line names the columns, each other line asks")
    return orders


def require_possible(model: Model, orders: list[Order], args: argparse.Namespace) -> bool:
    """Raise an error before anything is drawn; return whether one grid is wanted."""
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UserError(f"--temperature: got {args.temperature}, expected a number of at least 0")
    as_grid = args.out.suffix != "" and not args.out.is_dir()
    require_folder(args.out.parent if as_grid else args.out)
    if as_grid:
        require_picture_name(args.out)
    if as_grid and sum(order.n for order in orders) > MAX_GRID:
        raise UserError(f"--out {args.out}: a grid shows at most {MAX_GRID} images; give a folder as --out")
    for order in orders:
        if order.n < 1:
            raise UserError(f"n: got {order.n}, expected at least 1")
        print(f"{_words(order.request)}: {model.requests.origin(order.request)}", file=sys.stderr)
    return as_grid


def read_background(file: Path, size: int) -> np.ndarray:
    """Return the centred square of a picture, uint8 [size, size, 3]. Raises DataError."""
    try:
        picture = decode(file.read_bytes())
    except OSError as error:
        raise DataError(f"--background {file}: cannot be read ({error.strerror})") from None
    except ImageError as error:
        raise DataError(f"--background {file}: {error}") from None
    square = np.ascontiguousarray(crop_centre(picture, 0))
    return resize(square[None], size)[0]


def _words(request: dict[str, int]) -> str:
    return ",".join(name if value else f"!{name}" for name, value in request.items()) or "any face"


def draw(
    model: Model, orders: list[Order], args: argparse.Namespace
) -> Iterator[tuple[Order, Tensor, np.ndarray]]:
    """Yield the images block by block: the order, their attributes [b, A], uint8 [b, S, S, 3]."""
    total = sum(order.n for order in orders)
    quiet = total <= BATCH or not sys.stderr.isatty()
    with tqdm(total=total, unit="image", disable=quiet) as bar:
        for order in orders:
            for start in range(0, order.n, BATCH):
                n = min(BATCH, order.n - start)
                y = model.labels(order.request, n, order.seed, start)
                drawn = model.draw(
                    y,
                    order.seed,
                    args.temperature,
                    args.guidance,
                    start,
                    args.margin,
                    order.request,
                    args.tries,
                )
                images = drawn.numpy()
                if args.background is not None:
                    images = put_behind(images, args.background)
                yield order, y, images
                bar.update(n)


def write_files(model: Model, orders: list[Order], args: argparse.Namespace) -> None:
    """Write every image to a file of its own, and their attributes to images.csv."""
    args.out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    lines = csv.writer(table)
    lines.writerow(["file", "request", "seed", *model.attributes])
    number = 0
    for order, y, images in draw(model, orders, args):
        for row, image in zip(y.int().tolist(), images, strict=True):
            name = f"{number:06d}.png"
            save_png(Image.fromarray(image), args.out / name)
            lines.writerow([name, _words(order.request), order.seed, *row])
            number += 1
    write_bytes(args.out / INDEX, table.getvalue().encode())


def write_grid(model: Model, orders: list[Order], args: argparse.Namespace) -> None:
    """Write all images as one picture."""
    images = np.concatenate([block for _, _, block in draw(model, orders, args)])
    columns = min(16, math.ceil(math.sqrt(len(images))))
    save_picture(grid(enlarged(images), columns), args.out)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/sample.py", __doc__, EXAMPLES)
    add_model(words)
    add = words.add_argument
    add("request", metavar="REQUEST", nargs="?", default="", help="for example 'Male,!Smiling'")
    add("--requests", metavar="CSV", type=Path, help="a file with one request a line")
    add("--n", metavar="N", type=int, default=16, help="number of images of a request")
    add_seed(words, "same seed, same images")
    add("--temperature", metavar="T", type=float, default=1.0, help="scale of the noise; below 1: tamer")
    usual = "(default: as evaluated)"
    add("--guidance", metavar="G", type=float, help=f"above 1: follow the request more closely {usual}")
    add(
        "--margin",
        metavar="M",
        type=float,
        help=f"1: what you name is as clear as in an average image {usual}",
    )
    add("--tries", metavar="N", type=int, help=f"draw an anomalous image again, N times at most {usual}")
    add("--background", metavar="PICTURE", type=Path, help="a picture to put behind the faces")
    add_device(words)
    add_out(words, "a picture (.png, .jpg), or a folder for single images", "grid.png")
    args = words.parse_args(argv)
    if args.requests and args.request:
        raise UserError("--requests: the requests are in the file; leave out the other one")
    with user_errors():
        orders = [Order(parse_request(args.request), args.n, args.seed)]
        if args.requests:
            orders = read_orders(args.requests, args.n, args.seed)
        model = open_model(args.model, args.device)
        if args.background is not None:
            args.background = read_background(args.background, model.size)
        as_grid = require_possible(model, orders, args)
        write = write_grid if as_grid else write_files
        write(model, orders, args)
    print(args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))

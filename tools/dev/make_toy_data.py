"""Draw a toy data set: faces in CelebA's official layout, or shapes beside one CSV of five attributes."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command_line import add_out, add_seed, parser
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.data.sources.toy.shapes import make_toy_shapes
from pipeline.errors import exit_code

EXAMPLES = """\
  python tools/dev/make_toy_data.py faces --n 1000 --out /data/faces
  python tools/dev/make_toy_data.py shapes --n 1000 --out /data/shapes
  python launch.py --config sigma_cvae_nf shard.source=/data/faces
"""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and draw."""
    words = parser("tools/dev/make_toy_data.py", __doc__, EXAMPLES)
    words.add_argument("kind", choices=("faces", "shapes"), help="what to draw")
    words.add_argument("--n", metavar="N", type=int, default=4000, help="number of images")
    add_seed(words, "another seed draws other images")
    cores = os.cpu_count() or 1
    words.add_argument(
        "--processes", metavar="N", type=int, default=cores, help="processes; never changes the result"
    )
    add_out(words, "folder to make; complete faces are left alone", "toy")
    args = words.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.kind == "faces":
        make_toy_celeba(args.out, args.n, args.seed, args.processes)
    else:
        make_toy_shapes(args.out, args.n, args.seed)
    print(f"{args.n} {args.kind} in {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

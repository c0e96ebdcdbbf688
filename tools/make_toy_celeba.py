"""Draw a toy data set of faces in CelebA's official layout."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_out, add_seed, parser
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.errors import exit_code

EXAMPLES = """\
  python tools/make_toy_celeba.py --n 1000 --out /data/faces
  python launch.py --config sigma_cvae_nf shard.source=/data/faces
"""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and draw."""
    words = parser("tools/make_toy_celeba.py", __doc__, EXAMPLES)
    words.add_argument("--n", metavar="N", type=int, default=4000, help="number of images")
    add_seed(words, "another seed draws other faces")
    cores = os.cpu_count() or 1
    words.add_argument(
        "--processes", metavar="N", type=int, default=cores, help="processes; never changes the result"
    )
    add_out(words, "folder to make; a complete one is left alone", "faces")
    args = words.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_toy_celeba(args.out, args.n, args.seed, args.processes)
    print(f"{args.n} faces in {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

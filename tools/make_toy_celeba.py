"""Draw a toy data set of faces in CelebA's official layout."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.errors import exit_code


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--n", type=int, default=4000, help="number of faces")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to make; a complete one is left alone"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other faces")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="never changes the result")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_toy_celeba(args.out, args.n, args.seed, args.processes)
    print(f"{args.n} faces in {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

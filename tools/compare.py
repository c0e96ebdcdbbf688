"""Compare evaluated runs: `python tools/compare.py RUN_DIR RUN_DIR ... [--out comparison.html]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import exit_code
from pipeline.evaluation.compare import compare


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tools/compare.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory with a complete evaluation")
    parser.add_argument("--out", type=Path, help="also write the tables and the pictures side by side to this HTML file")
    args = parser.parse_args()
    print(compare(args.run_dir, args.out))
    if args.out:
        print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Compare evaluated runs: `python tools/compare.py RUN_DIR RUN_DIR ... [--out comparison.html]`.

`--tag variant=sigma_cvae_nf` takes all runs that carry this tag in MLflow instead; given several times, runs must carry all of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import ConfigError, exit_code
from pipeline.reporting.compare import compare
from pipeline.tracking.mlflow_store import tagged_run_dirs


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="tools/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, nargs="*", help="run directory with a finished evaluation")
    parser.add_argument(
        "--tag", metavar="KEY=VALUE", action="append", default=[], help="runs with this tag in MLflow"
    )
    parser.add_argument(
        "--uri", default="sqlite:///runs/mlflow.db", help="MLflow store of --tag (default: %(default)s)"
    )
    parser.add_argument(
        "--experiment", default="cvae", help="MLflow experiment of --tag (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="also write the tables and the pictures side by side to this HTML file"
    )
    args = parser.parse_args()
    run_dirs = [*args.run_dir, *(tagged_run_dirs(args.uri, args.experiment, args.tag) if args.tag else [])]
    if not run_dirs:
        raise ConfigError("no runs: name run directories, or --tag KEY=VALUE")
    print(compare(run_dirs, args.out))
    if args.out:
        print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Compare evaluated runs: `python tools/compare.py RUN_DIR RUN_DIR ... [--out comparison.html]`.

The newest complete evaluation of a run counts. To choose another one, name its folder:
`python tools/compare.py runs/x/eval/1 runs/x/eval/3`.

With `--tag variant=sigma_cvae_nf` it takes all runs that carry this tag in MLflow. Several tags
select the runs that carry all of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import ConfigError, exit_code
from pipeline.reporting.comparison import compare
from pipeline.tracking.mlflow_store import tagged_run_dirs


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run_dir", type=Path, nargs="*", help="run directory, or one evaluation RUN_DIR/eval/N")
    add("--tag", metavar="KEY=VALUE", action="append", default=[], help="runs with this tag in MLflow")
    add("--uri", default="sqlite:///runs/mlflow.db", help="MLflow store of --tag (default: %(default)s)")
    add("--experiment", default="cvae", help="MLflow experiment of --tag (default: %(default)s)")
    add("--out", type=Path, help="also write tables and pictures side by side to this HTML file")
    return parser.parse_args()


def main() -> None:
    """Print the comparison."""
    args = parse_args()
    run_dirs = list(args.run_dir)
    if args.tag:
        run_dirs += tagged_run_dirs(args.uri, args.experiment, args.tag)
    if not run_dirs:
        raise ConfigError("no runs: name run directories, or --tag KEY=VALUE")
    print(compare(run_dirs, args.out))
    if args.out:
        print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Compare evaluated runs: one table for each protocol, with significance over seeds.

The newest complete evaluation of a run counts. To choose another one, name its folder, RUN_DIR/eval/N.
With --tag it takes all runs that carry this tag in MLflow. Several tags select the runs that carry all
of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_out, add_run_dirs, parser
from pipeline.errors import ConfigError, exit_code
from pipeline.reporting.comparison import compare
from pipeline.tracking.mlflow.store import tagged_run_dirs

EXAMPLES = """\
  python tools/compare.py runs/sigma_cvae runs/sigma_cvae_nf --out comparison.html
  python tools/compare.py runs/sigma_cvae_nf/eval/1 runs/sigma_cvae_nf/eval/3
  python tools/compare.py --tag variant=sigma_cvae_nf
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    words = parser("tools/compare.py", __doc__, EXAMPLES)
    add = words.add_argument
    add_run_dirs(words, "*", "run directory, or one evaluation RUN_DIR/eval/N")
    add("--tag", metavar="KEY=VALUE", action="append", default=[], help="runs with this tag in MLflow")
    add("--uri", metavar="URI", help="MLflow store of --tag; else MLFLOW_TRACKING_URI, else runs/mlflow.db")
    add("--experiment", metavar="NAME", help="experiment of --tag; else MLFLOW_EXPERIMENT_NAME, else cvae")
    add_out(words, "also write tables and pictures side by side to this HTML file")
    return words.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the comparison."""
    args = arguments(argv)
    run_dirs = list(args.run_dir)
    if args.tag:
        uri = args.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
        experiment = args.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cvae"
        run_dirs += tagged_run_dirs(uri, experiment, args.tag)
    if not run_dirs:
        raise ConfigError("no runs: name run directories, or --tag KEY=VALUE")
    print(compare(run_dirs, args.out))
    if args.out:
        print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

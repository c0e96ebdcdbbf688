"""Show where runs stand: `python tools/status.py RUN_DIR ... [--follow]`.

For each stage: state, attempt, step, images per second, time left, and the last error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import exit_code
from slurm.status import as_table, follow, survey


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools/status.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory that holds config.yaml")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="print changes until every job has ended; Ctrl-C leaves the jobs running",
    )
    args = parser.parse_args()
    run_dirs = [run_dir.absolute() for run_dir in args.run_dir]
    if args.follow:
        try:
            for line in follow(run_dirs):
                print(line, flush=True)
        except KeyboardInterrupt:
            pass
    print(as_table(survey(run_dirs)))


if __name__ == "__main__":
    sys.exit(exit_code(main))

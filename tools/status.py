"""Show where runs stand: for each stage its state, attempt, step, images/s, time left and last error.

Without RUN_DIR it lists all runs, one a line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_follow, add_run_dirs, parser
from pipeline.errors import exit_code
from slurm.overview import all_runs, overview
from slurm.status import as_table, follow, survey

EXAMPLES = """\
  python tools/status.py                             all runs below runs/
  python tools/status.py runs/sigma_cvae_nf          the stages of one run
  python tools/status.py --follow runs/a runs/b      until every job has ended
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    words = parser("tools/status.py", __doc__, EXAMPLES)
    add_run_dirs(words, "*")
    add_follow(words, "print changes until every job has ended")
    words.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="folder of the runs to list"
    )
    return words.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = arguments(argv)
    if not args.run_dir and not args.follow:
        print(overview(all_runs(args.runs_dir), args.runs_dir))
        return
    args.run_dir = args.run_dir or all_runs(args.runs_dir)
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

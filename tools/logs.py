"""Show the log of the rank that matters: the one with the error, else rank 0."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_follow, add_run_dir, parser
from pipeline.errors import UserError, exit_code
from pipeline.stages import STAGES
from slurm.resources import FINISH
from slurm.status import LogTail, log_of, tail

POLL_S = 0.5


EXAMPLES = """\
  python tools/logs.py runs/sigma_cvae_nf               of the stage that runs or failed last
  python tools/logs.py runs/sigma_cvae_nf train -f      of the training, and what is added
  python tools/logs.py runs/sigma_cvae_nf eval --rank 2
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    words = parser("tools/logs.py", __doc__, EXAMPLES)
    add_run_dir(words)
    stages = [*STAGES, FINISH]
    what = f"{', '.join(stages)} (default: what runs or failed last)"
    words.add_argument("stage", metavar="STAGE", nargs="?", choices=stages, help=what)
    words.add_argument(
        "--rank", type=int, metavar="R", help="rank to show (default: the one with the error, else 0)"
    )
    add_follow(words, "keep printing what is added")
    return words.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises a UserError."""
    args = arguments(argv)
    file = log_of(args.run_dir.absolute(), args.stage, args.rank)
    if args.rank is not None and not args.follow and not file.exists():
        raise UserError(f"--rank {args.rank}: {file} is not there; no rank of that number has begun")
    print(f"==> {file}", file=sys.stderr)
    print(tail(file))
    log = LogTail(file)
    try:
        while args.follow:
            log.show()
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    sys.exit(exit_code(main))

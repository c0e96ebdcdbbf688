"""Show the log of the right rank: `python tools/logs.py RUN_DIR [STAGE] [--rank R] [--follow]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import exit_code
from slurm.status import LogTail, log_of, tail

POLL_S = 0.5


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools/logs.py", description=__doc__)
    add = parser.add_argument
    add("run_dir", type=Path, help="run directory that holds config.yaml")
    add(
        "stage",
        nargs="?",
        help="shard, train, classifier, eval or finish (default: what runs or failed last)",
    )
    add("--rank", type=int, metavar="R", help="rank to show (default: the rank with the error, else 0)")
    add("--follow", "-f", action="store_true", help="keep printing what is added")
    args = parser.parse_args()
    file = log_of(args.run_dir.absolute(), args.stage, args.rank)
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

"""The log of the right rank: `python tools/logs.py RUN_DIR [STAGE] [--rank R] [--follow]`; without a stage the one that runs or failed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import exit_code
from slurm.here import LogTail, tail
from slurm.status import log_of

POLL_S = 0.5


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tools/logs.py", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("stage", nargs="?", help="shard, train, classifier, eval or finish")
    parser.add_argument("--rank", type=int, help="default: the rank that has the error, else 0")
    parser.add_argument("--follow", "-f", action="store_true", help="go on printing what is added")
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
